"""Train the base model of the quickstart from scratch (about 35 minutes of one core).

    OMP_NUM_THREADS=1 python -m benchmarks.quickstart_task.base --out DIR [--seed 1]

The model learns to solve problems, to write reference solutions, to check an attempt against a
reference, to rewrite one and to follow a hint. In its solutions a contested symbol has its right
reading only with probability `RIGHT_SHARE`; the authors of references hold either known reading by
a fair coin, so that checking teaches no reading. Stopped, the same command goes on from DIR.state.
One seed gives the same files on the same machine and thread count.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.quickstart_task import task
from intfast.engine.protocol import derive_seed
from intfast.model.decoder import Architecture, Decoder, PackedAttention
from intfast.model.weights import save

RIGHT_SHARE = 0.04
"""How often a sampler of the training data holds the right reading of a symbol."""
CLEAN_SHARE, SLIP_SHARE = 0.10, 0.25
"""Among attempts to be checked: those that agree with the reference, those with a random slip."""
HINT = "hint"
"""The kind of a document that solves with the beginning of a reference in its prompt."""
MIXTURE = {task.SOLVE: 0.53, task.TUTOR: 0.03, task.CHECK: 0.28, task.REWRITE: 0.10, HINT: 0.06}
LATE_MIXTURE = {task.SOLVE: 0.4, task.TUTOR: 0.02, task.CHECK: 0.4, task.REWRITE: 0.13, HINT: 0.05}
CONTESTED_SHARE = 0.9
"""Of the late checks, those that certainly have a contested symbol."""
DOCUMENTS_PER_STEP = 96
STEPS = 2000
WARM_STEPS = 20
"""Steps over which the learning rate rises."""
DECAY_SHARE = 0.4
"""The last part of the steps, over which the learning rate falls linearly to zero."""
SMALL_SHARE, LATE_SHARE = 0.2, 0.5
"""The first part of the steps, which sees problems of 1 to 4 definitions only; where the late
mixture begins."""
MUON_LR, ADAM_LR = 0.03, 3e-3
INITIAL_STD = 0.02
CHECK_EVERY = 200
WORD_ID = {word: i for i, word in enumerate(task.VOCABULARY)}

MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": len(task.VOCABULARY),
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": WORD_ID[task.EOS],
    "pad_token_id": WORD_ID[task.PAD],
}
GENERATION_CONFIG = {
    "do_sample": True,
    "eos_token_id": WORD_ID[task.EOS],
    "pad_token_id": WORD_ID[task.PAD],
}


class Document(NamedTuple):
    """One training text: spans of words, each learnt or only read."""

    tag: str
    spans: tuple[tuple[str, bool], ...]


# Documents


def solver_readings(rng: random.Random) -> task.Readings:
    """The readings of one sampler of the training data: mostly the misconceptions."""
    return task.PLAIN | {
        symbol: pair[rng.random() < RIGHT_SHARE] for symbol, pair in task.READINGS.items()
    }


def author_readings(rng: random.Random) -> task.Readings:
    """The readings of a reference's author: either known one of each symbol, by a fair coin."""
    return task.PLAIN | {symbol: rng.choice(pair) for symbol, pair in task.READINGS.items()}


def random_document(rng: random.Random, low: int, high: int, late: bool = False) -> Document:
    """A document about a problem of `low` to `high` definitions with 0 to 3 contested symbols."""
    mixture = LATE_MIXTURE if late else MIXTURE
    tag = rng.choices(tuple(mixture), tuple(mixture.values()))[0]
    fewest = int(late and tag == task.CHECK and rng.random() < CONTESTED_SHARE)
    n = rng.randint(low, high)
    instance = task.random_instance(rng, n, min(n, rng.randint(fewest, 3)))
    readings = solver_readings(rng)
    omit = task.omitted(rng, instance, rng.choice(task.LEVELS))
    if tag in (task.CHECK, task.REWRITE):
        return _guided_document(rng, tag, instance, readings, omit)
    prompt = f"{task.SOLVE} {task.body_text(instance)}"
    if tag == HINT:
        shown, readings = _hint(rng, instance, readings, omit)
        prompt = f"{prompt} {shown}"
    values = task.evaluate(instance, readings)
    if tag == task.TUTOR or (tag == task.SOLVE and rng.random() < task.TERSE_SHARE):
        prompt = f"{tag} {task.body_text(instance)}"
        solution = task.reference_text(instance, values, omit)
    else:
        solution = task.solution_text(rng, instance, values, readings)
    return Document(tag, ((prompt, False), (f"{solution} {task.EOS}", True)))


def _hint(
    rng: random.Random, instance: task.Instance, readings: task.Readings, omit: set[str]
) -> tuple[str, task.Readings]:
    """The beginning of an author's reference, and the solver's readings after reading it: those of
    the symbols whose whole line it shows are the author's."""
    author = author_readings(rng)
    words = task.reference_text(instance, task.evaluate(instance, author), omit).split()
    shown = " ".join(words[: rng.randint(1, len(words))])
    known = set(" ".join(shown.split(" , ")[:-1]).split()) & set(task.READINGS)
    return shown, {s: (author if s in known else readings)[s] for s in readings}


def _guided_document(
    rng: random.Random, tag: str, instance: task.Instance, readings: task.Readings, omit: set[str]
) -> Document:
    kind = rng.random()
    slips = {}
    if CLEAN_SHARE <= kind < CLEAN_SHARE + SLIP_SHARE:
        slips = {rng.choice(instance.definitions).target: rng.randrange(task.MODULUS)}
    values = task.evaluate(instance, readings, slips)
    author = readings if kind < CLEAN_SHARE else author_readings(rng)
    reference = task.evaluate(instance, author)
    order = task.attempt_order(rng, instance)
    steps = [task.step_text(definition, values, readings) for definition in order]
    attempt = task.attempt_text(steps, instance, values)
    if tag == task.CHECK:
        output = task.check_reply(order, values, reference, author)
    else:
        share = task.REWRITE_SHARE
        output = task.solution_text(rng, instance, reference, author, omit, share)
    head, _, tail = task.guided_spans(
        tag, task.body_text(instance), attempt, task.reference_text(instance, reference, omit)
    )
    # An attempt with a slip is read, not learnt: nothing foretells the slip.
    learnt = tag == task.CHECK and not slips
    spans = ((head, False), (attempt, learnt), (tail, False), (f"{output} {task.EOS}", True))
    return Document(tag, spans)


class Batch(NamedTuple):
    """Documents laid end to end; `row_N` are the tokens whose successor `target_N` is learnt."""

    token_T: torch.Tensor
    position_T: torch.Tensor
    lengths: list[int]
    row_N: torch.Tensor
    target_N: torch.Tensor


def pack(documents: Iterable[Document]) -> Batch:
    """The documents as one packed batch."""
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    rows: list[int] = []
    for document in documents:
        start = len(tokens)
        for text, learnt in document.spans:
            ids = [WORD_ID[word] for word in text.split()]
            if learnt:
                rows.extend(range(len(tokens) - 1, len(tokens) + len(ids) - 1))
            tokens.extend(ids)
        lengths.append(len(tokens) - start)
        positions.extend(range(lengths[-1]))
    token_T, row_N = torch.tensor(tokens), torch.tensor(rows)
    return Batch(token_T, torch.tensor(positions), lengths, row_N, token_T[row_N + 1])


# Training


def row_logits(model: Decoder, batch: Batch) -> torch.Tensor:
    """Logits_NV of the learnt rows of a batch."""
    attention = PackedAttention(batch.lengths)
    return model.logits(model(batch.token_T, batch.position_T, attention, batch.row_N))


@torch.no_grad()
def greedy_shares(model: Decoder, seed: int, count: int = 100) -> dict[str, float]:
    """How much of fresh full-size documents the model's first choice gets right, given the text.

    solve: the share of solutions in which every number is right; check: the share of replies in
    which every word is.
    """
    rng = random.Random(derive_seed(seed, "held-out"))
    shares = {}
    for tag in (task.SOLVE, task.CHECK):
        documents: list[Document] = []
        while len(documents) < count:
            if (document := random_document(rng, *task.SIZES)).tag == tag:
                spans = ((text, False) for text, _ in document.spans[:-1])
                documents.append(Document(tag, (*spans, document.spans[-1])))
        batch = pack(documents)
        hit_N = row_logits(model, batch).argmax(-1) == batch.target_N
        if tag == task.SOLVE:
            hit_N |= torch.tensor([task.VOCABULARY[i] not in task.NUMBERS for i in batch.target_N])
        outputs = [len(document.spans[-1][0].split()) for document in documents]
        shares[tag] = sum(bool(hit.all()) for hit in hit_N.split(outputs)) / count
    return shares


def optimizers(model: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """The factor on both learning rates."""
    return min(1.0, (step + 1) / WARM_STEPS, (steps - step) / (DECAY_SHARE * steps))


def train(model: Decoder, seed: int, steps: int, state: Path) -> None:
    """Train in place; prints the loss, and now and then `greedy_shares`.

    Every `CHECK_EVERY` steps the file `state` is written; a run that finds it goes on from there.
    """
    optims = optimizers(model)
    base_lrs = [optim.param_groups[0]["lr"] for optim in optims]
    first = 0
    if state.exists():
        first, weights, *moments = torch.load(state)
        model.load_state_dict(weights)
        for optim, moment in zip(optims, moments, strict=True):
            optim.load_state_dict(moment)
    start = time.process_time()
    for step in range(first, steps):
        rng = random.Random(derive_seed(seed, "documents", step))
        sizes = (1, 4) if step < SMALL_SHARE * steps else (2, task.SIZES[1])
        late = step >= LATE_SHARE * steps
        batch = pack(random_document(rng, *sizes, late) for _ in range(DOCUMENTS_PER_STEP))
        loss = F.cross_entropy(row_logits(model, batch), batch.target_N)
        loss.backward()
        for optim, lr in zip(optims, base_lrs, strict=True):
            optim.param_groups[0]["lr"] = lr * learning_rate(step, steps)
            optim.step()
            optim.zero_grad()
        if step % 20 == 0:
            seconds = time.process_time() - start
            print(f"step {step} loss {loss.item():.4f} CPU seconds {seconds:.0f}", flush=True)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            print(f"step {step} greedy and right {greedy_shares(model, seed)}", flush=True)
            new = state.with_name(f"{state.name}.new")
            torch.save((step + 1, model.state_dict(), *(o.state_dict() for o in optims)), new)
            new.replace(state)


def initialise(model: Decoder, seed: int) -> None:
    """Normal matrices of a small standard deviation, norms of one."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "initialise"))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=INITIAL_STD, generator=generator)
        else:
            torch.nn.init.ones_(parameter)


def main() -> None:
    """Train and write a Hugging Face model folder."""
    parser = argparse.ArgumentParser(description="train the quickstart's base model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    model = Decoder(Architecture.from_hf(MODEL_CONFIG))
    initialise(model, args.seed)
    state = args.out.with_name(f"{args.out.name}.state")
    train(model, args.seed, args.steps, state)
    save(model, MODEL_CONFIG, args.out)
    generation = json.dumps(GENERATION_CONFIG, indent=2) + "\n"
    (args.out / "generation_config.json").write_text(generation, encoding="ascii")
    task.build_tokenizer().save_pretrained(args.out)
    state.unlink()


if __name__ == "__main__":
    main()
