"""A random model that reads any text: a token a byte, a chat template, few parameters."""

from pathlib import Path

import torch
from small_run import MODEL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.quickstart_task import base
from intfast.model.decoder import Architecture, Decoder
from intfast.model.weights import save

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def write_model(folder: Path, context: int = 8192) -> Path:
    """Save the model folder; the same one every time."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=MARKS[0])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    tokenizer.chat_template = TEMPLATE
    config = MODEL | {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": context,
    }
    torch.manual_seed(0)
    decoder = Decoder(Architecture.from_hf(config))
    base.initialise(decoder, 0)
    save(decoder, config, folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: Path, run: Path) -> list[str]:
    """Of a run of seconds with that model."""
    return [
        f"run={run}",
        f"model.path={model}",
        "model.dtype=float32",
        "model.device=cpu",
        "rollout.cache_gib=0.2",
        "batch.max_tokens=4096",
        "sampling={temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=24}",
        "rl.sampling={max_new_tokens=24}",
        "rl.steps=2",
        "rl.problems_per_step=2",
        "rl.group_size=4",
        "rl.minibatches=1",
        "evaluate.samples=2",
        "evaluate.ks=[1, 2]",
        "analysis.texts=0",
    ]
