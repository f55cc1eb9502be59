"""Small tokenizers of every kind, and what holds for a text that is cut and goes on in all."""

import random

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from intfast.prompts import split_steps
from intfast.tokens import cut, decode, encode, write

ANSWER = (
    "First step: 1 + 1 = 3.\n\nSecond step: 2 * 3 = 6, né?\n\n  indented \U0001f600数 ≤ 7\n\n\n\n"
    "Thus $x_1 = 6$.\n1. so\n\n- é\n\nTherefore \\boxed{6}."
)
REPLACEMENTS = (
    "Second step: 2 * 3 = 6.\n\n",
    "2 is even.\n\n",
    "$y$ = 6 \U0001f600\n\n",
    "数学 é.\n\n",
    "- a list\n\n",
    " a space in front.\n\n",
    "\tA tab.\n\n",
)
PROMPTS = ("<s>[INST] What is 1 + 1? [/INST]", "<s>user\n1 + 1?\nassistant\n")
CORPUS = [ANSWER, *REPLACEMENTS, *PROMPTS, "user assistant [INST] [/INST] even list so thus"] * 10
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level(add_prefix_space=False, normalizer=None) -> PreTrainedTokenizerFast:
    """GPT-2's kind: Llama 3, Qwen, tekken."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet),
    )
    return _fast(made)


def sentencepiece(scheme: str, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's kind; scheme: "first", "always", "never", or "normalizer"."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tail = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    if scheme == "normalizer":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="\u2581", prepend_scheme=scheme, split=False
        )
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    ascii_only = ["".join(c for c in text if c.isascii() and c != "\n") for text in CORPUS]
    made.train_from_iterator(
        ascii_only,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*SPECIALS, *byte_tokens]),
    )
    # They were special only so that the trainer keeps them.
    content = Tokenizer.from_str(made.to_str().replace('"special": true', '"special": false'))
    content.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return _fast(content)


def metaspace() -> PreTrainedTokenizerFast:
    """Words, by the Metaspace decoder, which drops the space of the first token."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS))
    return _fast(made)


def _fast(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


KINDS = {
    "byte-level": byte_level,
    "byte-level with a prefix space": lambda: byte_level(add_prefix_space=True),
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "sentencepiece, first": lambda: sentencepiece("first"),
    "sentencepiece, always": lambda: sentencepiece("always"),
    "sentencepiece, never": lambda: sentencepiece("never"),
    "sentencepiece, normalizer": lambda: sentencepiece("normalizer"),
    "sentencepiece, almost only bytes": lambda: sentencepiece("first", 320),
    "Metaspace decoder": metaspace,
}


def answers(tokenizer, prompt_ids, prompt, rng):
    """Ids of answers as a model may sample them: the tokenizer's, and with borders of its own."""
    whole = tokenizer.encode(prompt + ANSWER, add_special_tokens=False)
    if whole[: len(prompt_ids)] == prompt_ids:
        yield whole[len(prompt_ids) :]
    # Most such models say a space first.
    yield encode(tokenizer, " " + ANSWER)
    for _ in range(3):
        borders = sorted(rng.sample(range(1, len(ANSWER)), 12))
        parts = [ANSWER[a:b] for a, b in zip([0, *borders], [*borders, len(ANSWER)], strict=True)]
        yield [i for part in parts for i in encode(tokenizer, part)]


def check_texts(tokenizer, prompt: str, replacements=REPLACEMENTS) -> int:
    """Prefix and replacement are exactly their texts at every step; returns how many were tried."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    said, tried = decode(tokenizer, prompt_ids), 0
    for answer_ids in answers(tokenizer, prompt_ids, prompt, random.Random(0)):
        text = decode(tokenizer, answer_ids)
        assert text.strip() == ANSWER
        in_place = decode(tokenizer, [*prompt_ids, *answer_ids]).removeprefix(said)
        lead = in_place.removesuffix(text)
        assert lead in ("", " ")
        steps = split_steps(text, "\n\n")
        assert len(steps) >= 6
        for location, replacement in enumerate(steps, 1):
            end = sum(map(len, steps[: location - 1]))
            kept, between = cut(tokenizer, answer_ids, text, end)
            for content in (*replacements, replacement):
                ids = write(tokenizer, prompt_ids, answer_ids, kept, between + content)
                assert ids is not None, (location, content)
                made = [*answer_ids[:kept], *ids]
                # In place: nothing is added, and the answer begins as the sampled one does.
                space = lead if end or not content[0].isspace() else ""
                found = decode(tokenizer, [*prompt_ids, *made])
                assert found == said + space + text[:end] + content, (location, content)
                # By itself, as the grader reads it.
                assert decode(tokenizer, made).strip() == (text[:end] + content).strip()
                tried += 1
    return tried
