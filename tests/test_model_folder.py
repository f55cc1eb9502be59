"""Model folders that are hostile or do not fit: refused with a clear message, nothing is run."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

from intfast.config import PromptConfig
from intfast.model import weights
from intfast.model.folder import is_own_file, load_tokenizer
from intfast.prompts import ChatStyle

ROOT = Path(__file__).parents[1]
CANARY = "pwned-by-a-model"


class Payload:
    """Makes a folder when unpickled."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


def edit(name: str, **changes):
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return apply


def write(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickles(name: str):
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload()))

    return apply


def index(**weight_map: str):
    data = json.dumps({"weight_map": weight_map}).encode()
    return write("model.safetensors.index.json", data)


def tensors(change):
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def link(name: str, target: Path):
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def remote_code(name: str):
    def apply(folder: Path) -> None:
        (folder / "evil.py").write_text(f"import os\nos.mkdir({CANARY!r})\nclass Evil: pass\n")
        edit(name, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Evil"})(
            folder
        )

    return apply


def header(size: int, body: bytes = b""):
    return write("model.safetensors", struct.pack("<Q", size) + body)


BAD = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,99]}}'
HOSTILE = {
    "pickle weights": (pickles("pytorch_model.bin"), "only pickle weights"),
    "pickle checkpoint": (pickles("model.pt"), "only pickle weights"),
    "pickle named safetensors": (
        write("model.safetensors", pickle.dumps(Payload())),
        "damaged safetensors",
    ),
    "code for the model": (remote_code("config.json"), "auto_map"),
    "code for the tokenizer": (remote_code("tokenizer_config.json"), "auto_map"),
    "another architecture with code": (edit("config.json", model_type="evil"), "not supported"),
    "index with ..": (index(a="../secret.safetensors"), "beside it"),
    "index with an absolute path": (index(a="/etc/passwd"), "beside it"),
    "index with a subfolder": (index(a="x/y.safetensors"), "beside it"),
    "index with a pickle": (index(a="pytorch_model.bin"), "beside it"),
    "index with a missing shard": (index(a="gone.safetensors"), "missing"),
    "index that is a list": (write("model.safetensors.index.json", b"[]"), "JSON object"),
    "index without a map": (index(), "weight_map"),
    "huge header": (header(1 << 62), "damaged safetensors"),
    "header beyond the file": (header(1000, b"{}"), "damaged safetensors"),
    "header that lies": (header(len(BAD), BAD), "damaged safetensors"),
    "empty weights": (write("model.safetensors", b""), "damaged safetensors"),
    "link to a file elsewhere": (link("merges.txt", Path("/etc/passwd")), "outside the model"),
    "weights linked elsewhere": (link("model.safetensors", Path("/etc/passwd")), "outside the"),
    "config that is a list": (write("config.json", b"[]"), "JSON object"),
    "config that is not JSON": (write("config.json", b"{"), "not valid JSON"),
    "config nested deeply": (write("config.json", b'{"a":' * 9000), "not valid JSON"),
    "a billion layers": (edit("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
}
UNFIT = {
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json"),
    "damaged tokenizer": (write("tokenizer.json", b'{"model":'), "not valid JSON"),
    "tokenizer of another kind": (write("tokenizer.json", b"{}"), "tokenizer"),
    "tokenizer that is a list": (write("tokenizer.json", b"[1]"), "JSON object"),
    "no weights": (remove("model.safetensors"), "no weights"),
    "no config": (remove("config.json"), "no config.json"),
    "vocabulary larger than the embedding": (
        lambda folder: edit(
            "tokenizer.json", added_tokens=[{"id": 999, "content": "x", "special": True}]
        )(folder),
        "token id 999|tokenizer cannot be read",
    ),
    "embedding of another vocabulary": (edit("config.json", vocab_size=61), "shape"),
    "another width": (edit("config.json", hidden_size=64), "shape"),
    "more layers than weights": (edit("config.json", num_hidden_layers=4), "missing"),
    "fewer layers than weights": (edit("config.json", num_hidden_layers=2), "unexpected"),
    "heads that do not divide": (edit("config.json", num_key_value_heads=3), "multiple of"),
    "odd head width": (edit("config.json", head_dim=15), "even"),
    "text for a number": (edit("config.json", num_attention_heads="4"), "whole number"),
    "a size below zero": (edit("config.json", vocab_size=-5), "whole number"),
    "a size that is missing": (edit("config.json", hidden_size=None), "missing hidden_size"),
    "another family": (edit("config.json", model_type="gpt2"), "not supported"),
    "an encoder": (edit("config.json", architectures=["BertModel"]), "not supported"),
    "quantised": (edit("config.json", quantization_config={"bits": 4}), "quantization_config"),
    "quantised weights": (
        tensors(lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
        "no quantised weights",
    ),
    "another activation": (edit("config.json", hidden_act="gelu"), "hidden_act"),
    "soft capping": (edit("config.json", attn_logit_softcapping=50.0), "softcapping"),
    "an unknown rope": (
        edit("config.json", rope_parameters={"rope_type": "x", "rope_theta": 1.0}),
        "rope",
    ),
    "a tensor too many": (tensors(lambda t: t.update(x=torch.zeros(1))), "unexpected: x"),
    "tied, with another head": (
        lambda folder: (
            edit("config.json", tie_word_embeddings=True)(folder),
            tensors(lambda t: t["lm_head.weight"].add_(1))(folder),
        ),
        "ties lm_head",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    make_model(folder, "llama", tie_word_embeddings=False)
    return folder


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read(folder: Path) -> None:
    """What a run does with a model folder before any work."""
    weights.check(folder)
    load_tokenizer(folder)
    weights.load(folder)


@pytest.mark.parametrize("name", [*HOSTILE, *UNFIT])
def test_hostile_and_unfit_folders_are_refused(model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    change, message = (HOSTILE | UNFIT)[name]
    folder = copy_of(model, tmp_path / "m")
    read(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        read(folder)
    assert not (tmp_path / CANARY).exists()
    assert len(HOSTILE) >= 20 and len(UNFIT) >= 25


def test_no_refusal_is_an_assert(model, tmp_path):
    """The same folders under `python -O`, which drops asserts."""
    for number, (change, _) in enumerate(HOSTILE.values()):
        change(copy_of(model, tmp_path / str(number)))
    program = (
        "import sys\nfrom pathlib import Path\nfrom intfast.model import weights\n"
        "from intfast.model.folder import load_tokenizer\n"
        f"assert False, 'asserts are on'\nfor n in range({len(HOSTILE)}):\n"
        f"    folder = Path({str(tmp_path)!r}) / str(n)\n"
        "    try:\n        load_tokenizer(folder); weights.load(folder)\n"
        "    except ValueError:\n        continue\n    sys.exit(f'{n} was read')\n"
    )
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-O", "-c", program],
        cwd=tmp_path,
        env=path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / CANARY).exists()


def test_links_of_the_hub_cache_are_the_folders_own(model, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    copy_of(model, repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    read(snapshot)
    (snapshot / "x.json").symlink_to("/etc/passwd")
    assert is_own_file(snapshot, "config.json") and not is_own_file(snapshot, "x.json")


# --- chat templates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "chat template"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "loses turns"),
        ("{{ messages[0].content }}<|end|>", "loses turns"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no answer would ever stop"),
        ("{{ raise_exception('only user turns') }}", "cannot render"),
        ("{% for m in messages %}{{ m.content", "cannot render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render|loses turns"),
    ],
)
def test_unfit_chat_templates_are_refused(bpe, template, message):
    good = bpe.chat_template
    try:
        bpe.chat_template = template
        with pytest.raises(ValueError, match=message):
            ChatStyle(PromptConfig(), bpe)
    finally:
        bpe.chat_template = good


def test_a_tokenizer_without_an_end_is_refused(bpe):
    end = bpe.eos_token
    try:
        bpe.eos_token = None
        with pytest.raises(ValueError, match="end-of-sequence"):
            ChatStyle(PromptConfig(), bpe)
    finally:
        bpe.eos_token = end
