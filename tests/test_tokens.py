"""Texts and ids: cuts on sampled tokens, and texts that go on, with every kind of tokenizer."""

import pytest
from token_kinds import ANSWER, KINDS, PROMPTS, byte_level, check_texts, sentencepiece

from intfast.tokens import cut, decode, encode, write


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prefix_and_replacement_are_exactly_their_texts(tokenizer, prompt):
    assert check_texts(tokenizer, prompt) >= 150


def test_a_text_that_goes_on_gets_nothing_in_front(tokenizer):
    before = tokenizer.encode("1 + 1 = 2.", add_special_tokens=False)
    for text in ("Second", "2", " so", "\n\nThus", "\U0001f600", "é", "$x$", "  so", ""):
        ids = encode(tokenizer, text)
        assert decode(tokenizer, [*before, *ids]) == decode(tokenizer, before) + text


def test_a_cut_at_every_place_is_the_last_boundary(tokenizer):
    token_ids = tokenizer.encode(ANSWER, add_special_tokens=False)
    text = decode(tokenizer, token_ids)
    heads = [decode(tokenizer, token_ids[:n]) for n in range(len(token_ids) + 1)]
    for end in range(len(text) + 1):
        kept, between = cut(tokenizer, token_ids, text, end)
        assert heads[kept] + between == text[:end]
        whole = [n for n, h in enumerate(heads) if len(h) <= end and text.startswith(h)]
        assert kept == (whole[-1] if end else 0)


def test_a_cut_in_bytes_that_are_no_character_keeps_the_text():
    tokenizer = sentencepiece("first")
    byte = {i: tokenizer.convert_tokens_to_ids(f"<0x{i:02X}>") for i in range(256)}
    broken = [byte[b] for b in "é数".encode()[:-1]]
    for ids in (
        [*encode(tokenizer, "so "), *broken, *encode(tokenizer, "\n\nend")],
        [*broken, *broken],
        [byte[0xFF]] * 5,
    ):
        text = decode(tokenizer, ids)
        for end in range(len(text) + 1):
            kept, between = cut(tokenizer, ids, text, end)
            assert decode(tokenizer, ids[:kept]) + between == text[:end]


def test_ids_that_are_no_tokens_are_nothing_in_the_text():
    """An embedding has more rows than the tokenizer has tokens, and a model may sample them."""
    tokenizer = byte_level()
    ids = encode(tokenizer, "a\n\nb")
    unknown = [len(tokenizer) + 7]
    text = decode(tokenizer, [*ids[:1], *unknown, *ids[1:]])
    assert text == "a\n\nb"
    kept, between = cut(tokenizer, [*ids[:1], *unknown, *ids[1:]], text, 3)
    assert (kept, between) == (len(ids), "")


def test_spaces_before_signs_are_not_cleaned_up():
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    assert decode(tokenizer, encode(tokenizer, "a , b . do n't")) == "a , b . do n't"


def test_what_no_ids_can_write_is_said():
    """NFC would change the text; a half character in front swallows the bytes behind it."""
    nfc = KINDS["byte-level, NFC"]()
    prompt, answer = encode(nfc, "p"), encode(nfc, "a\n\nb")
    assert write(nfc, prompt, answer, 1, "e\u0301") is None
    assert decode(nfc, write(nfc, prompt, answer, 1, "\u00e9")) == "\u00e9"
    tokenizer = sentencepiece("first")
    half = [tokenizer.convert_tokens_to_ids("<0xE6>")]
    assert write(tokenizer, half, half, 1, "\U0001f600") is None
    assert write(tokenizer, half, half, 1, "so") is not None


def test_words_joined_by_the_decoder_have_one_writing():
    from benchmarks.quickstart_task import task

    tokenizer = task.build_tokenizer()
    prompt, answer = encode(tokenizer, "<solve> a 7 ;"), encode(tokenizer, "d a : 7 = d 4 ;")
    ids = write(tokenizer, prompt, answer, 0, " d a : 7 = d 7 ;")
    assert decode(tokenizer, [*prompt, *ids]) == "<solve> a 7 ; d a : 7 = d 7 ;"
