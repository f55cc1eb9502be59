"""Whether a model folder computes here what it computes in transformers, on real text.

Loading and exporting, bit for bit; log-probs of text, against transformers; the loss head, against
fp64; log-probs of the engine's own samples, against the trainer's forward; greedy answers, token by
token. `python -m benchmarks.real_model` makes a folder where no hub can be reached.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, models, word_problems
from intfast.config import PromptConfig
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Request, Sampling
from intfast.kernels.linear_logprob import linear_logprob
from intfast.model import weights
from intfast.model.decoder import Decoder, PackedAttention
from intfast.model.folder import COMPANIONS, load_tokenizer
from intfast.parity import compare
from intfast.prompts import ChatStyle
from intfast.records import Problem
from intfast.tokens import encode

NAME = "fidelity"
# Largest mean difference of log-probs, nat: text against transformers, samples against the trainer.
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (0.05, 0.03)}
# The head alone, on the same hidden states, against fp64: largest difference, nat.
HEAD_BOUND = 1e-4
SAMPLED = 64
"""Tokens of a sample whose log-probs are compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how much of everything."""
    models.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=8, help="word problems (%(default)s)")
    parser.add_argument("--paragraphs", type=int, default=8, help="of the README (%(default)s)")
    parser.add_argument("--new", type=int, default=96, help="greedy tokens (%(default)s)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row."""
    if not args.model:
        raise SystemExit("--model FOLDER is needed; python -m benchmarks.real_model makes one")
    tokenizer = load_tokenizer(Path(args.model))
    decoder, peer = models.load(args)
    style = ChatStyle(PromptConfig(), tokenizer)
    problems = word_problems.make_all(args.prompts, 3, args.seed)
    prompts = [
        style.solve(Problem(id=str(i), problem=row.problem, answer=row.answer))
        for i, row in enumerate(problems)
    ]
    texts = [
        [*prompt, *encode(tokenizer, row.reference_solution), style.stop_ids[0]]
        for prompt, row in zip(prompts, problems, strict=True)
    ]
    texts += [encode(tokenizer, text) for text in paragraphs(args.paragraphs)]
    mean, sampled = BOUNDS[args.dtype]
    found = {
        "export": export(decoder, args),
        "text": text_gaps(decoder, peer, texts),
        "head": {"max": head_gap(decoder, texts[0])},
        "sampled": sampled_gaps(decoder, prompts, args.seed),
        "greedy": greedy(decoder, peer, prompts, style.stop_ids, args.new),
    }
    harness.gate("log-probs of text, mean", found["text"]["mean"], mean)
    harness.gate("the head against fp64", found["head"]["max"], HEAD_BOUND)
    harness.gate("the engine's own log-probs, mean", found["sampled"]["mean"], sampled)
    print(f"  {found}")
    return [{"setting": models.setting(decoder, args), "figures": found}]


def paragraphs(num: int) -> list[str]:
    """The first prose paragraphs of this project's README."""
    text = (harness.ROOT / "README.md").read_text()
    prose = [part for part in text.split("\n\n") if len(part) > 300 and part[0].isalpha()]
    return prose[:num]


def export(decoder: Decoder, args: argparse.Namespace) -> dict[str, int]:
    """Tensors that are bit for bit the same after our loading and saving; raises if one is not."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as name:
        saved = weights.save(decoder, args.model, Path(name) / "export")
        pair = [AutoModelForCausalLM.from_pretrained(f, dtype=dtype) for f in (args.model, saved)]
        before, after = (model.state_dict() for model in pair)
        same_files = all(
            (saved / name).read_bytes() == (Path(args.model) / name).read_bytes()
            for name in COMPANIONS
            if (Path(args.model) / name).is_file()
        )
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    harness.gate("tensors that differ after an export", float(len(differ)), 0)
    harness.gate("tokenizer files that differ", float(not same_files), 0)
    return {"tensors": len(before), "different": 0}


@torch.no_grad()
def text_gaps(decoder: Decoder, peer: Any, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """|ours - transformers| of every token's log-prob, and the texts' mean, nat."""
    ours = NativeEngine(decoder).score(texts)
    gaps, values = [], []
    for tokens, scores in zip(texts, ours, strict=True):
        ids_1T = torch.tensor([tokens], device=decoder.head_weight_VD.device)
        logprob_TV = peer(ids_1T).logits[0, :-1].float().log_softmax(-1)
        theirs_T = logprob_TV.gather(1, ids_1T[0, 1:, None])[:, 0].cpu()
        gaps.append((theirs_T - torch.tensor(scores)).abs())
        values.append(theirs_T)
    gap, value = torch.cat(gaps), torch.cat(values)
    return {
        "tokens": len(gap),
        "mean": gap.mean().item(),
        "max": gap.max().item(),
        "nll": -value.mean().item(),
    }


@torch.no_grad()
def head_gap(decoder: Decoder, tokens: Sequence[int]) -> float:
    """Largest error of the head's log-probs against fp64, on the decoder's own hidden states."""
    device = decoder.head_weight_VD.device
    token_T = torch.tensor(tokens, device=device)
    position_T = torch.arange(len(tokens), device=device)
    hidden_TD = decoder(token_T, position_T, PackedAttention([len(tokens)], device))[:-1]
    logprob_T, _ = linear_logprob(hidden_TD, decoder.head_weight_VD, token_T[1:], entropy="none")
    exact_TV = (hidden_TD.double() @ decoder.head_weight_VD.double().T).log_softmax(-1)
    return (exact_TV.gather(1, token_T[1:, None])[:, 0] - logprob_T).abs().max().item()


def sampled_gaps(decoder: Decoder, prompts: Sequence[Sequence[int]], seed: int) -> dict[str, float]:
    """The log-probs that came with samples against the trainer's forward, as `parity` has them."""
    rnd = random.Random(seed)
    engine = NativeEngine(decoder)
    requests = [
        Request(
            prompt_ids=ids, seeds=[rnd.randrange(2**63)], sampling=Sampling(max_new_tokens=SAMPLED)
        )
        for ids in prompts
    ]
    drawn = [group[0] for group in engine.generate(requests)]
    scores = engine.score([[*ids, *one.token_ids] for ids, one in zip(prompts, drawn, strict=True)])
    trainer = [
        value
        for score, one in zip(scores, drawn, strict=True)
        for value in score[-len(one.token_ids) :]
    ]
    sampler = [value for one in drawn for value in one.logprobs]
    return compare(torch.tensor(trainer), torch.tensor(sampler))


@torch.no_grad()
def greedy(
    decoder: Decoder,
    peer: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    num_new: int,
) -> dict[str, Any]:
    """How many greedy answers are transformers' token for token.

    Where one is not, `margins` has the distance, in transformers' logits, of the two tokens that
    were chosen at the first place where they differ: rounding may choose between close ones.
    """
    sampling = Sampling(max_new_tokens=num_new, temperature=0.0, stop_ids=tuple(stop_ids))
    requests = [Request(prompt_ids=ids, seeds=[0], sampling=sampling) for ids in prompts]
    ours = [group[0].token_ids for group in NativeEngine(decoder).generate(requests)]
    margins: list[float] = []
    num_tokens = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids_1T = torch.tensor([list(prompt)], device=decoder.head_weight_VD.device)
        found_T: Tensor = peer.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            max_new_tokens=num_new,
            eos_token_id=list(stop_ids),
        )[0, len(prompt) :]
        theirs = found_T.tolist()
        num_tokens += len(theirs)
        if theirs != tokens:
            pairs = enumerate(zip(theirs, tokens, strict=False))
            at = next(i for i, (their, our) in pairs if their != our)
            logits_V = (
                peer(torch.tensor([[*prompt, *theirs[:at]]]).to(ids_1T)).logits[0, -1].float()
            )
            margins.append((logits_V[theirs[at]] - logits_V[tokens[at]]).abs().item())
    equal = len(prompts) - len(margins)
    return {"answers": len(prompts), "equal": equal, "tokens": num_tokens, "margins": margins}
