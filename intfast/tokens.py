"""Texts and token ids, to the character: what is sampled is never tokenised again, only cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

ANCHORS = ("\n", "a", "0", ".")
SPAN = 8
"""Tokens of two characters of four bytes."""


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The exact text of token ids, special tokens included."""
    # Cleaning up spaces would make a text that no cut of the ids gives back.
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that stands behind another, with nothing added.

    Where no ids are exactly this text (a tokenizer may change characters), those that it gives.
    """
    direct = tokenizer.encode(text, add_special_tokens=False)
    # Words that the decoder joins with spaces have no other writing.
    if tokenizer.backend_tokenizer.decoder is None:
        return direct
    # Tokenizers of the sentencepiece kind put a space before a text that begins, so the text is
    # read behind something that does not merge with it.
    for anchor in ANCHORS:
        head = tokenizer.encode(anchor, add_special_tokens=False)
        whole = tokenizer.encode(anchor + text, add_special_tokens=False)
        tails = [direct, whole[len(head) :]] if whole[: len(head)] == head else [direct]
        for tail in tails:
            if decode(tokenizer, [*head, *tail]) == decode(tokenizer, head) + text:
                return tail
    return direct


def write(
    tokenizer: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int], num_kept: int, text: str
) -> list[int] | None:
    """The ids that write `text` behind a prompt and the first ids of an answer, or None.

    None where no ids add exactly this text. In place of the answer's beginning, the text begins
    as the answer does: with the space that a sentencepiece model says and its decoder drops.
    """
    before = [*prompt_ids, *answer_ids[:num_kept]]
    head = decode(tokenizer, before)
    if not num_kept and not text[:1].isspace():
        spoken = decode(tokenizer, [*before, *answer_ids]).removeprefix(head)
        text = spoken[: len(spoken) - len(decode(tokenizer, answer_ids))] + text
    ids = encode(tokenizer, text)
    return ids if decode(tokenizer, [*before, *ids]) == head + text else None


def cut(tokenizer: Any, token_ids: Sequence[int], text: str, end: int) -> tuple[int, str]:
    """(number of tokens whose text lies within `text[:end]`, the rest of `text[:end]`).

    The ids are never re-tokenised: the cut falls on the last boundary of the sampled tokens that
    is not past `end`; what lies between that boundary and `end` is returned as text.
    """

    # Decoded length grows with the number of tokens: ten decodes for a thousand.
    counts = range(1, len(token_ids) + 1) if end else ()
    num = bisect_right(counts, end, key=lambda n: len(decode(tokenizer, token_ids[:n])))
    # A boundary inside a character decodes to replacement characters: step back in front of them.
    while not text.startswith(head := decode(tokenizer, token_ids[:num])):
        num -= 1
    # ... and forward: where every byte is a token, a character is shorter when it is whole.
    for more in range(num + 1, min(num + SPAN, len(token_ids)) + 1) if len(head) < end else ():
        longer = decode(tokenizer, token_ids[:more])
        if len(longer) <= end and text.startswith(longer):
            num, head = more, longer
    return num, text[len(head) : end]
