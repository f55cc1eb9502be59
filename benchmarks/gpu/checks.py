"""Is it right on this device: the loss head, the decoder, the embedded engine."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.group import Group, architecture, filled, relative
from intfast.config import PolicyConfig
from intfast.engine import cache
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Request, Sampling
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import CrossEntropy, Streams
from intfast.loss import head_plans
from intfast.model.decoder import Architecture, PackedAttention

BF16, FP32 = torch.bfloat16, torch.float32


def odds(group: Group) -> None:
    """The loss head in bf16 against fp32 logits: it may hang, be wrong, or differ from itself."""
    shapes = [(255, 200, 257), (1025, 2560, 50_257), (4096, 2560, 151_936)]
    # The plain path is the CPU's own; there the interpreter runs the kernel.
    path = {} if group.is_cuda else {"path": "odds"}
    for rows, width, vocabulary in shapes if group.is_cuda else [(17, 64, 97)]:
        with group.checking(f"loss head {rows} x {width} x {vocabulary}") as said:
            device = group.device
            made = torch.Generator(device).manual_seed(1)
            weight = torch.randn(vocabulary, width, generator=made, device=device).to(BF16)
            target = torch.randint(vocabulary, (rows,), generator=made, device=device)
            hidden = 2 * torch.randn(rows, width, generator=made, device=device) / width**0.5
            leaves = [x.to(BF16).requires_grad_() for x in (hidden, weight)]
            plans = head_plans(leaves[1], rows, PolicyConfig(), 1.0)
            said.append(f"{plans['sft'] if group.is_cuda else 'odds, interpreted'}:")
            found = [_head(*leaves, target, path) for _ in range(2)]
            with torch.no_grad():
                entropy = linear_logprob(*leaves, target, entropy="value", **path)[1]
                exact = _exact_head(*leaves, target)
            errors = [
                float((x.double() - y).abs().max())
                for x, y in ((found[0][0], exact[0]), (entropy, exact[1]))
            ]
            errors.append(relative(found[0][1], exact[2]))
            said.append("log-prob {:.1e}, entropy {:.1e}, hidden gradient {:.1e}".format(*errors))
            assert all(e < most for e, most in zip(errors, (1e-4, 1e-3, 1e-2), strict=True)), said
            same = all(torch.equal(x, y) for x, y in zip(*found, strict=True))
            assert same, f"two calls differ; {said}"


def _head(hidden: Tensor, weight: Tensor, target: Tensor, path: dict) -> list[Tensor]:
    hidden.grad = weight.grad = None
    streams = Streams(torch.ones(len(target), device=target.device))
    out = linear_objective(hidden, weight, target, CrossEntropy(), streams, entropy="none", **path)
    out.loss.backward()
    return [out.logprob_T.detach().clone(), hidden.grad.clone(), weight.grad.clone()]


def _exact_head(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    """(log-probs, entropies, gradient of hidden) from fp32 logits and fp64 sums, by chunks."""
    parts, wide = [], weight.float()
    for x, y in zip(hidden.split(512), target.split(512), strict=True):
        logprob = (x.float() @ wide.T).double().log_softmax(1)
        prob = logprob.exp()
        entropy = -(prob * logprob).sum(1)
        prob[torch.arange(len(y), device=y.device), y] -= 1
        parts.append((logprob.gather(1, y[:, None])[:, 0], entropy, prob.float() @ wide))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


MODELS = {
    "grouped": {"num_attention_heads": 8, "head_dim": 64},
    "head 128": {"num_attention_heads": 4, "head_dim": 128},
    "head 32": {"num_attention_heads": 8, "head_dim": 32},
    "window": {
        "num_attention_heads": 8, "head_dim": 64, "use_sliding_window": True, "sliding_window": 50,
        "max_window_layers": 0,
    },
}  # fmt: skip
"""Two layers each; in the tests of decoder and engine."""


def decoder(group: Group) -> None:
    """Hidden states and all gradients against fp32 on the CPU from the same rounded weights."""
    cases = [(FP32, "torch", False), (BF16, "torch", False), (BF16, "torch", True)]
    if group.is_cuda:
        cases += [(FP32, "liger", False), (BF16, "liger", False)]
    for name, keys in MODELS.items():
        config = architecture(hidden_size=256, vocab_size=1000, intermediate_size=512, **keys)
        exact = {dtype: _passes(config, FP32, "cpu", rounded=dtype) for dtype in (FP32, BF16)}
        for dtype, kernels, checkpointing in cases:
            how = f"{str(dtype)[6:]} {kernels}{' checkpointing' * checkpointing}"
            with group.checking(f"decoder {name} {how}") as said:
                runs = [
                    _passes(config, dtype, group.device, kernels, checkpointing) for _ in range(2)
                ]
                errors = {key: relative(x, exact[dtype][key]) for key, x in runs[0].items()}
                worst = max(errors, key=errors.get)
                same = all(torch.equal(x, runs[1][key]) for key, x in runs[0].items())
                said.append(f"hidden {errors['hidden']:.1e}, worst {errors[worst]:.1e} ({worst}),")
                # Expected of bf16 on CUDA: attention's backward adds with atomics.
                said.append(f"same bits twice: {same}")
                assert errors[worst] < (2e-4 if dtype == FP32 else 0.1), said


def _passes(
    config: Architecture,
    dtype: torch.dtype,
    device: str,
    kernels: str = "torch",
    checkpointing: bool = False,
    rounded: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Hidden states of some rows and the gradients of all parameters, fp32 on the CPU."""
    lengths = [1, 5, 130, 77, 64]
    made = filled(config, dtype, device, kernels, rounded)
    made.activation_checkpointing = checkpointing
    generator = torch.Generator().manual_seed(2)
    token_T = torch.randint(1000, (sum(lengths),), generator=generator).to(device)
    position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
    rows_C = torch.arange(0, sum(lengths), 3, device=device)
    hidden = made(token_T, position_T, PackedAttention(lengths, device), rows_C)
    upstream = torch.randn(hidden.shape, generator=generator)
    (hidden.float() * upstream.to(device)).sum().backward()
    grads = {name: p.grad.float().cpu() for name, p in made.named_parameters()}
    return {"hidden": hidden.detach().float().cpu()} | grads


def engine(group: Group) -> None:
    """Sampled log-probs against the trainer's scores of the same tokens; cuDNN's attention last."""
    cases = [(FP32, "grouped", False), (FP32, "window", False), (BF16, "grouped", False)]
    cases += [(BF16, "window", False), *([(BF16, "grouped", True)] if group.is_cuda else [])]
    for dtype, name, cudnn in cases:
        with group.checking(f"engine {str(dtype)[6:]} {name} cudnn {cudnn}") as said:
            keys = {"hidden_size": 256, "vocab_size": 4096, "intermediate_size": 512}
            native = NativeEngine(filled(architecture(**keys, **MODELS[name]), dtype, group.device))
            tokens = 160 if group.is_cuda else 12
            asked = _requests(tokens)
            with attention_by_cudnn() if cudnn else nullcontext():
                groups = native.generate(asked)
                start = time.perf_counter()
                again = native.generate(asked)
                took = time.perf_counter() - start
            samples = [(r, c) for r, made in zip(asked, groups, strict=True) for c in made]
            scores = native.score([[*r.prompt_ids, *c.token_ids] for r, c in samples])
            gaps = torch.tensor([
                abs(a - b)
                for (_, sample), score in zip(samples, scores, strict=True)
                for a, b in zip(score[-len(sample.token_ids):], sample.logprobs, strict=True)
            ])  # fmt: skip
            same = groups == again
            said.append(f"gap {gaps.mean():.1e} mean, {gaps.max():.1e} at most,")
            said.append(f"{1e3 * took / tokens:.2f} ms a step; same twice: {same}")
            assert gaps.mean() < (1e-4 if dtype == FP32 else 0.03), said
            if dtype == BF16 and not cudnn:
                native.generate(_requests(tokens, temperature=0.7, top_p=0.8, top_k=20))
                native.generate(_requests(tokens, temperature=0.0))


def _requests(tokens: int, **sampling: float) -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    return [
        Request(
            prompt_ids=torch.randint(4096, (n,), generator=generator).tolist(),
            seeds=[17 * n + sample for sample in range(4)],
            sampling=Sampling(max_new_tokens=tokens, **sampling),
        )
        for n in (1, 2, 33, 64, 200)
    ]


@contextmanager
def attention_by_cudnn():
    """What the trainer keeps away from masks, to see whether that is still needed."""
    with (
        mock.patch.object(cache, "under_a_mask", nullcontext, create=True),
        sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
    ):
        yield


GROUPS = {"odds": odds, "decoder": decoder, "engine": engine}
