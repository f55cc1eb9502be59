"""The verdict of a reply, read as hostile input.

The attempt under verification was sampled by a model and may hold anything: our tags, a ready-made
verdict, the marks of a chat turn. What is quoted is made harmless, and a verdict counts only inside
tags that carry a mark which does not occur in the attempt, so that an echo of it says nothing.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from intfast.records import Record
from intfast.safe_text import hidden_characters

TAGS = ("attempt", "location", "intervention", "problem", "reference")
# Between the letters of a disguised tag: white space and characters without a width. Possessive
# (*+), here and below: what a pattern gave back and tried again would cost more than linear time.
_INVISIBLE = (
    r"[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]*+"
)
_NAMES = "|".join(_INVISIBLE.join(tag) for tag in TAGS)
# Also with full-width angle brackets: a tokenizer may read them as plain ones.
_OUR_TAGS = re.compile(
    rf"[<\uff1c\ufe64](?={_INVISIBLE}/?+{_INVISIBLE}(?:{_NAMES}))", re.IGNORECASE
)


class Verdict(Record):
    """What a verification says: the first wrong step (from 1) and the step to put in its place.

    `reason` is empty for a usable verdict; otherwise it is the gate that drops it: "no_error" (the
    reply finds nothing wrong), "unparsed" (not in the asked form), "conflict" (several verdicts
    that differ), "bad_location", or "unsafe_text" (characters or tokens that must not be trained).
    """

    location: int = 0
    content: str = ""
    reason: str = ""


def mark_of(text: str) -> str:
    """Eight hexadecimal digits that do not occur in a text; the same text gives the same mark."""
    # The attempt was written before its mark is known; should it hold the mark all the same, the
    # next one is taken.
    for salt in range(len(text) + 1):
        mark = hashlib.blake2b(f"{salt} {text}".encode(errors="replace"), digest_size=4).hexdigest()
        if mark not in text:
            return mark
    raise AssertionError("a text of n characters has fewer than n + 1 substrings of eight")


def neutralise(text: str) -> str:
    """The text with our own tags made harmless, in disguise too: "</attempt>" -> "< /attempt>"."""
    return _OUR_TAGS.sub(lambda match: match[0] + " ", text)


def has_tags(text: str) -> bool:
    """Whether a text holds one of our tags, in disguise too."""
    return _OUR_TAGS.search(text) is not None


def control_tokens(tokenizer: Any, unflagged: bool = False) -> re.Pattern[str]:
    """Matches the first character of a text that a transformers tokenizer reads as a control token.

    unflagged: also of added tokens that look like one and are not flagged so, such as <tool_call>.
    """
    texts = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        is_marked = token.content[:1] in ("<", "[") and token.content[-1:] in (">", "]")
        texts |= {token.content} if token.special or (unflagged and is_marked) else set()
    texts = {text for text in texts if len(text) > 1}
    return re.compile(f"(?={_any_of(texts)}).", re.DOTALL) if texts else re.compile("(?!)")


def _any_of(texts: set[str]) -> str:
    """A pattern of texts, letter by letter: a thousand of them cost what their longest costs."""
    if "" in texts:
        return ""
    heads = sorted({text[0] for text in texts})
    tails = [re.escape(h) + _any_of({t[1:] for t in texts if t[0] == h}) for h in heads]
    return tails[0] if len(tails) == 1 else f"(?:{'|'.join(tails)})"


def break_tokens(text: str, tokens: re.Pattern[str]) -> str:
    """The text with control tokens broken by a space, so that it cannot end or forge a turn."""
    return tokens.sub(lambda match: match[0] + " ", text)


def read(reply: str, mark: str, num_steps: int, tokens: re.Pattern[str]) -> Verdict:
    """The verdict of a reply whose tags must carry `mark`.

    All well-formed blocks must say the same, since nothing tells which of two is meant; a marked
    tag outside them makes the reply unreadable. `tokens` are control tokens that must not occur
    in the replacement.
    """
    block = re.compile(
        rf"<location-{mark}>([^<>]*+)</location-{mark}>\s*+(<intervention-{mark}>)?+"
    )
    # A set: a reply that says the same thing twice says one thing.
    closing, found, rest, end = f"</intervention-{mark}>", set(), [], 0
    while match := block.search(reply, end):
        rest.append(reply[end : match.start()])
        content, begin = "", (end := match.end())
        if match[2]:
            # By hand: a pattern would look for an end that is missing behind every block again.
            if (end := reply.find(closing, begin)) < 0:
                return Verdict(reason="unparsed")
            content, end = reply[begin:end], end + len(closing)
        found.add((match[1].strip(" \t\n"), content.strip()))
    # What remains must hold no piece of a block: half a verdict is none.
    remains = "".join([*rest, reply[end:]])
    if not found or f"location-{mark}" in remains or f"intervention-{mark}" in remains:
        return Verdict(reason="unparsed")
    if len(found) > 1:
        return Verdict(reason="conflict")
    ((place, content),) = found
    # Finding nothing wrong in a wrong attempt is an answer, too; it is counted under its own gate.
    if place.lower() == "none":
        return Verdict(reason="unparsed" if content else "no_error")
    # ASCII digits alone: int() would also read those of other scripts.
    if not re.fullmatch(r"[0-9]{1,6}", place) or not content or has_tags(content):
        return Verdict(reason="unparsed")
    location = int(place)
    if not 1 <= location <= num_steps:
        return Verdict(location=location, content=content, reason="bad_location")
    if hidden_characters(content) or tokens.search(content):
        return Verdict(location=location, content=content, reason="unsafe_text")
    return Verdict(location=location, content=content)
