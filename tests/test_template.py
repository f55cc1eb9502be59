"""Chat templates: both ends, dates, arguments, the system turn; and where answers end."""

import json
from datetime import UTC, datetime

import pytest
from small_run import Quiet
from test_model_folder import copy_of
from tiny import make_model
from token_kinds import sentencepiece

from intfast import cli, verdict
from intfast.config import PromptConfig
from intfast.methods import prompts
from intfast.model.folder import load_tokenizer, said
from intfast.prompts import style_of
from intfast.records import Problem
from intfast.run import open_run
from intfast.state import runfolder
from intfast.study import derive
from intfast.tokens import decode, encode, write

PROBLEM = Problem(id="p", problem="What is 2 + 2?", answer="4", reference="It is \\boxed{4}.")
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
OPENS = "{{ '<|im_start|>assistant\n' }}"


def chatml(turn: str = TURN, opens: str = OPENS, head: str = "") -> str:
    """A template in which `opens` is what stands for add_generation_prompt."""
    return (
        f"{head}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opens}{{% endif %}}"
    )


THINKS = chatml(
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] "
    "+ '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}",
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chat_bpe(bpe):
    """The byte-level tokenizer with ChatML's tokens, and some that are not flagged special."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "    "])
    tokenizer.chat_template = chatml()
    return tokenizer


def style(tokenizer, now=None, **config):
    return style_of(PromptConfig(**config), tokenizer, now)


# --- where answers end -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    make_model(folder, "llama", tie_word_embeddings=False)
    return folder


def write_json(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_end_tokens_of_all_three_files_are_joined(model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    compact = {"style": "compact", "separator": ";"}
    assert style(tokenizer, **compact).stop_ids == (2,)
    write_json(folder / "generation_config.json", eos_token_id=[5, 2, 9], temperature=0.1)
    write_json(folder / "config.json", eos_token_id=7)
    tokenizer = load_tokenizer(folder)
    assert set(style(tokenizer, **compact).stop_ids) == {2, 5, 7, 9}
    assert style(tokenizer, **compact).stop_ids[0] == 2
    tokenizer.eos_token = None
    assert set(style(tokenizer, **compact).stop_ids) == {2, 5, 7, 9}
    told = said(folder, tokenizer, (2, 9))
    assert told == "weights from model.safetensors; answers end at '</s>' (2), '5' (9)"


@pytest.mark.parametrize("ids", [62, -1, "2", [2, None], True, [[2]], 2.0])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_no_ids_are_refused(model, tmp_path, file, ids):
    folder = copy_of(model, tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    write_json(folder / file, eos_token_id=ids)
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id: expected token ids below 62"):
        style(tokenizer, style="compact", separator=";")


def test_the_end_to_train_is_what_the_template_writes(chat_bpe):
    """ChatML on a tokenizer whose own end is another: Qwen's base models, Gemma, Phi."""
    end, other = chat_bpe.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    chat_bpe.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"'<\|im_end\|>.*none of the end tokens.*endoftext"):
        style(chat_bpe)
    chat_bpe.end_ids = lambda: (other, end)
    assert style(chat_bpe).stop_ids == (end, other)


def test_pad_and_end_may_be_one_token(chat_bpe):
    chat_bpe.pad_token = "<|im_end|>"
    assert style(chat_bpe).stop_ids == (chat_bpe.eos_token_id,)


# --- both ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opens",
    [
        "",
        "{{ '\n' }}",
        "{{ '<|im_start|>user\n' }}",
        "{{ '<|im_start|>' }}",
        "{{ '<|im_start|>model\n' }}",
    ],
)
def test_a_template_that_does_not_open_the_assistants_turn_is_refused(chat_bpe, opens):
    chat_bpe.chat_template = chatml(opens=opens)
    with pytest.raises(ValueError, match="does not open the assistant's turn"):
        style(chat_bpe)


def test_a_template_without_a_generation_prompt_of_its_own_is_fine():
    """Mistral's: the end of the question opens the answer, and a space leads it in."""
    tokenizer = sentencepiece("first")
    tokenizer.chat_template = MISTRAL
    chat = style(tokenizer)
    asked = chat.solve(PROBLEM)
    assert asked == tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBLEM.problem}], return_dict=False
    )
    # One bos, the template's own, though the tokenizer would add one to a text.
    assert asked.count(tokenizer.bos_token_id) == 1
    assert chat.lead == " " and chat.stop_ids == (tokenizer.eos_token_id,)
    turns = [
        {"role": "user", "content": PROBLEM.problem},
        {"role": "assistant", "content": PROBLEM.reference},
    ]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert whole == [*asked, *encode(tokenizer, chat.lead + PROBLEM.reference), whole[-1]]


def test_a_template_that_loses_the_system_turn_or_refuses_it_is_refused(chat_bpe):
    chat_bpe.chat_template = chatml("{% if m.role != 'system' %}" + TURN + "{% endif %}")
    style(chat_bpe)
    with pytest.raises(ValueError, match="loses turns"):
        style(chat_bpe, system="Be brief.")
    tokenizer = sentencepiece("first")
    tokenizer.chat_template = MISTRAL
    with pytest.raises(ValueError, match=r"system, user, .*only user and.*leave prompt.system"):
        style(tokenizer, system="Be brief.")


def test_the_system_turn_stands_first_in_every_request(chat_bpe):
    chat = style(chat_bpe, system="Be brief.")
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    for ids in (chat.solve(PROBLEM), chat.guided(PROBLEM), chat.verify(PROBLEM, ["a"], "g")):
        text = decode(chat_bpe, ids)
        assert text.startswith(head) and text.count("Be brief.") == 1


def test_a_default_template_of_several_is_used(chat_bpe):
    plain = style(chat_bpe).solve(PROBLEM)
    chat_bpe.chat_template = {"default": chatml(), "tool_use": "{{ 1 }}"}
    assert style(chat_bpe).solve(PROBLEM) == plain
    chat_bpe.chat_template = {"rag": chatml(), "tool_use": "{{ 1 }}"}
    with pytest.raises(ValueError, match="cannot render"):
        style(chat_bpe)


# --- arguments and dates -----------------------------------------------------------------------


def test_arguments_reach_the_template_and_a_wrong_name_is_told(chat_bpe):
    chat_bpe.chat_template = THINKS
    thinking = decode(chat_bpe, style(chat_bpe).solve(PROBLEM))
    quiet = style(chat_bpe, template_args={"enable_thinking": False})
    assert thinking.endswith("<think>\n")
    assert decode(chat_bpe, quiet.solve(PROBLEM)) == thinking + "\n</think>\n\n"
    with pytest.raises(ValueError, match="never reads 'enable_thinkng'"):
        style(chat_bpe, template_args={"enable_thinkng": False})
    with pytest.raises(ValueError, match="multiple values"):
        style(chat_bpe, template_args={"add_generation_prompt": False})


DATED = (
    "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ '<|im_start|>system\n' }}"
    "{% if strftime_now is defined %}{{ day('%d %b %Y') + strftime_now(' %H:%M:%S') }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
)


def test_dates_and_clocks_are_those_that_the_run_gives(chat_bpe):
    chat_bpe.chat_template = chatml(head=DATED)
    then = datetime(2026, 3, 1, 7, 8, 9, tzinfo=UTC)
    first, second = (style(chat_bpe, now) for now in (then, then.replace(day=2)))
    texts = [decode(chat_bpe, made.solve(PROBLEM)) for made in (first, second, first)]
    assert "01 Mar 2026 07:08:09" in texts[0] and "02 Mar 2026" in texts[1]
    assert texts[0] == texts[2]


def test_a_run_keeps_the_date_and_the_ends_that_it_was_started_with(model, tmp_path, monkeypatch):
    folder = copy_of(model, tmp_path / "m")
    turn = "{{ m.role + '\n' + m.content + eos_token + '\n' }}"
    head = "{{ strftime_now('%d.%m.%y %h') + '\n' }}"
    (folder / "chat_template.jinja").write_text(chatml(turn, "{{ 'assistant\n' }}", head))
    rows = [{"problem": f"what is {n} + 1?", "answer": f"{n + 1}"} for n in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = cli.load(
        None,
        [
            f"data.train={tmp_path / 'rows.jsonl'}",
            f"model.path={folder}",
            f"run={tmp_path / 'run'}",
            *("model.device=cpu", "model.dtype=float32", "sft.epochs=0", "rl.problems=selected"),
            *("sampling.max_new_tokens=16", "batch.max_tokens=256", "rl.steps=1"),
        ],
    )

    def texts():
        with open_run(config, Quiet()) as run:
            sampler = run.sampler
            return [decode(sampler.tokenizer, sampler.prompt(p)) for p in run.problems]

    first = texts()
    for name in ("manifest.json", "prompt_time.txt"):
        with monkeypatch.context() as patched:
            patched.setattr(runfolder, "datetime", Later)
            assert texts() == first
        if name == "prompt_time.txt":
            break
        # The manifest alone is enough, and the file alone is what a comparison's arms get.
        (tmp_path / "run/prompt_time.txt").unlink()
    assert first[0].startswith(datetime.now(UTC).strftime("%d.%m.%y"))
    stored = (tmp_path / "run/prompt_time.txt").read_text()
    arm = tmp_path / "arm"
    derive.give(tmp_path / "run", arm, [runfolder.PROMPT_TIME])
    with monkeypatch.context() as patched:
        patched.setattr(runfolder, "datetime", Later)
        assert runfolder.prompt_time(arm).isoformat() == stored
        assert runfolder.prompt_time(tmp_path / "new").year == 2044
    write_json(folder / "generation_config.json", eos_token_id=[2, 5])
    with pytest.raises(ValueError, match=r"stop_ids: was \[2\], is \[2, 5\]"):
        texts()


class Later(datetime):
    """Years after the tests."""

    @classmethod
    def now(cls, tz=None):
        return cls(2044, 1, 2, tzinfo=tz)


# --- thoughts ----------------------------------------------------------------------------------


def test_the_thought_that_a_prompt_opens_stays_in_the_prompt(chat_bpe):
    chat_bpe.chat_template = THINKS
    chat = style(chat_bpe)
    prompt = chat.solve(PROBLEM)
    think = chat_bpe.convert_tokens_to_ids("<think>")
    assert think in prompt[-3:]
    text = "Let x = 1.\n\nThen y = 2.\n</think>\n\nSo é 3."
    steps = chat.split(text)
    assert steps == ["Let x = 1.\n\n", "Then y = 2.\n</think>\n\n", "So é 3."]
    ids = write(chat_bpe, prompt, encode(chat_bpe, text), 0, "Let x = 2.\n\n")
    assert decode(chat_bpe, [*prompt, *ids]) == decode(chat_bpe, prompt) + "Let x = 2.\n\n"
    assert think not in ids
    # In a guided solution the thought ends where the model ended it: the template may drop it.
    asked = decode(chat_bpe, chat.verify(PROBLEM, steps, "a thought\n</think>\n\nguided"))
    assert "<|im_start|>assistant\n\n\nguided<|im_end|>" in asked and "a thought" not in asked


def test_control_tokens_that_a_student_writes_come_apart(chat_bpe):
    """Flagged special or not: <tool_call> is a token as much as <|im_end|>."""
    chat = style(chat_bpe)
    marks = ["<think>", "</think>", "<tool_call>", "<|im_start|>", "<|endoftext|>"]
    ids = set(chat_bpe.convert_tokens_to_ids(marks))
    hostile = "x = 2 " + " ".join(marks) + "    y"
    once = ids & set(chat.solve(PROBLEM)) | ids & set(chat.verify(PROBLEM, ["a"], "g"))
    problem = Problem(id="q", problem="p", answer=hostile, reference=hostile)
    for asked in (
        chat.verify(PROBLEM, [hostile], "g"),
        chat.guided(problem),
        prompts.reflect(chat, PROBLEM, hostile),
        prompts.hint(chat, PROBLEM, hostile),
    ):
        assert ids & set(asked) == once
        assert "< tool_call>" in decode(chat_bpe, asked)
        # White space is no markup, though it is an added token.
        assert "    y" in decode(chat_bpe, asked)
    mark = chat.mark(["a"])
    for token in marks:
        reply = f"<location-{mark}>1</location-{mark}>"
        reply += f"<intervention-{mark}>{token}</intervention-{mark}>"
        assert chat.read(reply, ["a"]).reason == "unsafe_text"


def test_an_instruction_keeps_its_tokens(chat_bpe):
    chat = style(chat_bpe, instruction="Think inside <think> tags.")
    assert chat_bpe.convert_tokens_to_ids("<think>") in chat.solve(PROBLEM)


def test_nested_and_overlapping_control_tokens_come_apart():
    class Nested:
        all_special_tokens = ("<|a|>", "|a|", "<|a|><|b|>", "x", "a.c")
        added_tokens_decoder = {}  # noqa: RUF012

    tokens = verdict.control_tokens(Nested)
    for text in ("<|a|><|b|>", "|a|a|", "<<|a|>>", "abc a.c x"):
        broken = verdict.break_tokens(text, tokens)
        assert not tokens.search(broken)
        assert broken.replace(" ", "") == text.replace(" ", "")
    assert verdict.break_tokens("abc x", tokens) == "abc x"
