"""Plant realistic bugs in a copy of kernels/ and see the kernel tests catch each of them.

    python tests/mutants_kernels.py [--planted-only] [substring of a file or note ...]

Exit status 1 if a planted bug survives. Needs triton; takes minutes, so it is not collected by
pytest.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Read when a kernel is defined; the imports are shared by the processes that are forked later.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: F401
import pytest
import torch  # noqa: F401
import triton  # noqa: F401

ROOT = Path(__file__).parents[1]
LOGPROB, OBJECTIVE, SPANS = "linear_logprob", "linear_objective", "span_cross_entropy"
GROUPS = "group_advantages"
OBJECTIVES, PRECISION = "objectives", "precision"
NORM, HEADS, GATE, LAYER, CONTRACTS = "add_rms_norm", "norm_rope", "swiglu", "layer", "contracts"
ROW64 = "row = tl.program_id(0).to(tl.int64)"

# (file, note, what the test file is called, from, to); `from` is replaced once, at its first place
MUTANTS = [
    ("head/odds", "padded columns enter the sum", LOGPROB,
     "valid = (cols[None, :] < V) & (cols[None, :] != target.to(tl.int32)[:, None])",
     "valid = cols[None, :] != target.to(tl.int32)[:, None]"),
    ("head/odds", "target stays in the sum", LOGPROB,
     "valid = (cols[None, :] < V) & (cols[None, :] != target.to(tl.int32)[:, None])",
     "valid = cols[None, :] < V"),
    ("head/odds", "int32 offset of hidden rows", LOGPROB,
     "x_at = x_ptr + rows.to(tl.int64)[:, None]", "x_at = x_ptr + rows[:, None]"),
    ("head/odds", "int32 offset of the target row", LOGPROB,
     ROW64, "row = tl.program_id(0)"),
    ("head/rows", "int32 offset of logits", LOGPROB, ROW64, "row = tl.program_id(0)"),
    ("head/odds", "forgotten 1 / (1 + R)", LOGPROB,
     "-dlogprob_C / ((r_C + torch.exp(-shift_C)) * plan.temperature)",
     "-dlogprob_C / plan.temperature"),
    ("head/odds", "forgotten temperature in the gradient", LOGPROB,
     "(r_C + torch.exp(-shift_C)) * plan.temperature", "(r_C + torch.exp(-shift_C))"),
    ("head/odds", "wrong sign in the target column", LOGPROB,
     "own = -r * cap_slope(logit", "own = r * cap_slope(logit"),
    ("head/odds", "overflow not noticed", LOGPROB, "tl.constexpr(6e27)", "tl.constexpr(6e37)"),
    ("head/rowmath", "shift left out of the log-prob", LOGPROB,
     "-(shift + log_total)", "-log_total"),
    ("head/odds", "ragged tail of the inner axis", LOGPROB,
     "in_d = (inner < D)[None, :]", "in_d = (inner < D + 1)[None, :]"),
    ("head/rowmath", "log(1 + x) instead of log1p", LOGPROB,
     "tl.where(x < 0.5, 2.0 * s * (1.0 + q * tail), tl.log(1.0 + x))", "tl.log(1.0 + x)"),
    ("head/rowmath", "softcap slope left out", LOGPROB,
     "return 1.0 - tanh * tanh", "return 1.0 + 0.0 * tanh"),
    ("head/rows", "rescaling forgets the entropy sum", LOGPROB,
     "k = (k - drop * r) * tl.exp(-drop)", "k = k * tl.exp(-drop)"),
    ("head/rows", "sums not rescaled", LOGPROB, "r = r * tl.exp(-drop)", "r = r * 1.0"),
    ("head/rows", "entropy slope of the target", LOGPROB,
     "own_slope += dentropy", "own_slope -= dentropy"),
    ("head/rows", "impossible target read as 0", LOGPROB,
     'tl.where(known | (target == IGNORED), logit, float("nan"))', "logit"),
    ("head/plain", "off-by-one target", LOGPROB,
     "column_C1 = target_C.clamp_min(0)[:, None]",
     "column_C1 = (target_C.clamp_min(0)[:, None] - 1).clamp_min(0)"),
    ("head/plain", "log(1 + R) instead of log1p", LOGPROB,
     "r_C.log1p()", "(r_C + 1).log()"),
    ("head/plain", "softcap slope left out", LOGPROB, "left_CV *= factor_CV", "pass"),
    ("head/chunks", "gradient of ignored rows", LOGPROB,
     "dlogprob_C = torch.where(live_C, dlogprob_C, 0)", "dlogprob_C = dlogprob_C"),
    ("head/chunks", "NaN of ignored rows", LOGPROB, ".masked_fill(ignored_C1, 0)", ""),
    ("head/chunks", "only the last chunk's weight gradient", LOGPROB,
     "self.fresh and start == 0", "self.fresh"),
    ("head/chunks", "main gradient overwritten", LOGPROB,
     "self.fresh and start == 0", "start == 0"),
    ("head/chunks", "rows scattered in another order", LOGPROB,
     "index_copy_(0, rows_R, value_R)", "index_copy_(0, rows_R.flip(0), value_R)"),
    ("head/chunks", "weight gradient of no rows uninitialised", LOGPROB,
     "self.weight_VD.zero_()", "pass"),
    ("head/plan", "chunks over the byte budget", OBJECTIVE,
     "head.chunk_bytes //", "2 * head.chunk_bytes //"),
    ("linear_objective", "gradient scaled in place", OBJECTIVE,
     "hidden_grad_RD * dloss", "hidden_grad_RD.mul_(dloss)"),
    ("linear_objective", "incoming gradient ignored", OBJECTIVE,
     "else weight_grad_VD * dloss", "else weight_grad_VD"),
    ("linear_objective", "tokens of weight 0 take part", OBJECTIVE,
     "torch.where(streams.weight_T == 0, IGNORE, target_T)", "target_T"),
    ("linear_objective", "coupled objective done per chunk", OBJECTIVE,
     "couples = objective.whole_batch and len(bounds) > 1", "couples = False"),
    ("span_cross_entropy", "rows without loss enter", SPANS,
     "if len(rows_R) == len(weight_T):", "if True:"),
    ("objectives", "one bound for both sides of the clip", OBJECTIVES,
     "max=1 + self.high", "max=1 + self.low"),
    ("objectives", "gradient through the clipped branch", OBJECTIVES,
     "torch.where(free_T, -dratio_T * advantage_T, 0)", "-dratio_T * advantage_T"),
    ("objectives", "sign of the k3 slope", OBJECTIVES,
     "-torch.expm1(bounded_T)", "torch.expm1(bounded_T)"),
    ("objectives", "CISPO bounds around 1", OBJECTIVES,
     "ratio_T.clamp(self.low, self.high)", "ratio_T.clamp(1 - self.low, 1 + self.high)"),
    ("objectives", "masked correction truncates", OBJECTIVES,
     'if self.mode == "truncate":', "if True:"),
    ("objectives", "sequence mean over dead tokens", OBJECTIVE,
     "live_T = streams.weight_T != 0", "live_T = streams.weight_T == streams.weight_T"),
    ("objectives", "missing sampler log-prob poisons", OBJECTIVES,
     "torch.nan_to_num(old_T - sampler_T, nan=0.0)", "old_T - sampler_T"),
    ("group_advantages", "eps under the root", GROUPS,
     "tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)) + eps",
     "tl.sqrt(squares / tl.maximum(count - 1.0, 1.0) + eps)"),
    ("group_advantages", "population for unbiased", GROUPS,
     "tl.sqrt(squares / tl.maximum(count - 1.0", "tl.sqrt(squares / tl.maximum(count - 0.0"),
    ("group_advantages", "noise of equal rewards", GROUPS,
     "factor = tl.where(active, factor, 0.0)", "factor = factor * 1.0"),
    ("group_advantages", "unscored tokens keep their weight", GROUPS,
     "weight = tl.where(scored, weight, 0.0)", "weight = weight * 1.0"),
    ("group_advantages", "one-pass variance", GROUPS,
     "centred = tl.where(reward == reward, (reward - low) - mean, 0.0)\n"
     "        squares += tl.sum(centred * centred, 0)",
     "centred = tl.where(reward == reward, reward, 0.0)\n"
     "        squares += tl.sum(centred * centred, 0) - "
     "tl.sum((reward == reward).to(tl.float32), 0) * (low + mean) * (low + mean)"),
    ("group_advantages", "graded groups that differ counted as right", GROUPS,
     "flat = low == high", "flat = count > 0"),
    ("group_advantages", "unscored tokens keep their weight on the CPU", GROUPS,
     "torch.where(scored_N[sample_T], token_weight_T, 0)", "token_weight_T.clone()"),
    ("adamw", "what clipping leaves is not applied", "adamw",
     "other=0.0) * grad_scale", "other=0.0) * 1.0"),
    ("adamw", "a split master loses its carry", "adamw",
     "tl.store(narrow_ptr + at, ((bits + HALF) >> 16)", "tl.store(narrow_ptr + at, (bits >> 16)"),
    ("adamw", "chance begins anew on every rank", "adamw",
     "chance = (at + first)", "chance = at"),
    ("adamw", "short squares round to nearest", "adamw",
     "square.to(tl.int32, bitcast=True) + chance", "square.to(tl.int32, bitcast=True) + HALF"),
    ("adamw", "second moment without its correction", "adamw",
     "tl.sqrt(square) / root + eps", "tl.sqrt(square) + eps"),
    ("adamw", "no decay", "adamw", "keep * master - rate", "master - rate"),
    ("adamw", "eps under the correction", "adamw",
     "tl.sqrt(square) / root + eps", "(tl.sqrt(square) + eps) / root"),
    ("adamw", "narrow weights are not the masters", "adamw",
     "tl.store(narrow_ptr + at, master.to", "tl.store(narrow_ptr + at, mean.to"),
    ("adamw", "bias corrections of the step before", "adamw",
     "1 - betas[0] ** step", "1 - betas[0] ** (step + 1)"),
    ("add_gradient", "each micro-batch starts anew", "add_gradient", "if not FRESH:", "if FRESH:"),
    ("add_gradient", "squares of the last gradient alone", "add_gradient",
     "tl.sum(total * total, 0)", "tl.sum(total * tl.load(grad_ptr + at, inside, other=0.0), 0)"),
    ("truth", "leave-one-out without its factor", GROUPS,
     "centred * len(reward) / (len(reward) - 1)", "centred"),
    ("head/plan", "temperature rounded on its way to the operators", LOGPROB,
     "{self.temperature!r}", "{self.temperature:.3f}"),
    ("head/chunks", "autocast rounds the products", PRECISION,
     "enabled=False", "enabled=torch.is_autocast_enabled(first.device.type)"),
    ("head/plan", "factors of one chunk rounded to the result's type", PRECISION,
     "dtype = torch.promote_types(out.dtype, torch.promote_types(left.dtype, torch.float32))",
     "dtype = out.dtype"),
    ("head/plan", "a vocabulary summed term after term", PRECISION,
     "TERMS = 4096", "TERMS = 1 << 30"),
    ("head/chunks", "factors of two types", PRECISION, "right_CD.to(left_CV.dtype)", "right_CD"),
    ("head/odds", "partial sums of the first tiles only", LOGPROB,
     "for start in range(0, tiles_v, BLOCK_P)", "for start in range(0, BLOCK_P, BLOCK_P)"),
    ("head/odds", "target logit of the first columns only", LOGPROB,
     "for start in range(0, D, BLOCK_D)", "for start in range(0, BLOCK_D, BLOCK_D)"),
    ("head/rescue", "maximum of the first columns only", LOGPROB,
     "for start in range(0, V, BLOCK_V)", "for start in range(0, BLOCK_V, BLOCK_V)"),
    ("head/rescue", "overflowing rows redone on the first columns only", LOGPROB,
     "        k = 0.0\n        for start in range(0, V, BLOCK_V)",
     "        k = 0.0\n        for start in range(0, BLOCK_V, BLOCK_V)"),
    ("objectives", "scaled k3 by the slope of k3 alone", OBJECTIVES,
     "-scaled_T * d_T)", "-scaled_T * torch.expm1(d_T))"),
    ("objectives", "trust region the wrong way round", OBJECTIVES,
     "moved_T > self.high, moved_T < -self.low", "moved_T < self.high, moved_T > -self.low"),
    (NORM, "another stream is normalised than is written", NORM,
     "(x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)",
     "x.to(tl.float32) + delta.to(tl.float32)"),
    (NORM, "eps inside the mean", NORM,
     "tl.sum(x * x, 0) / D + eps", "(tl.sum(x * x, 0) + eps) / D"),
    (NORM, "the normalised row rounded before the weight", NORM,
     "normed = (x * scale * weight)",
     "normed = ((x * scale).to(normed_ptr.dtype.element_ty).to(tl.float32) * weight)"),
    (NORM, "the stream's own gradient forgotten", NORM,
     "dx += held.to(tl.float32)", "dx += 0.0 * held.to(tl.float32)"),
    (NORM, "mean over the padded width", NORM,
     "tl.sum(grad * normal, 0) / D", "tl.sum(grad * normal, 0) / BLOCK_D"),
    (NORM, "weight's gradient of the first program alone", NORM,
     "partial_PD.sum(0)", "partial_PD[0]"),
    (NORM, "a strided gradient read as one piece", NORM,
     "row * stride_dnormed", "row * D"),
    (NORM, "int32 offset of rows", CONTRACTS, ROW64, "row = tl.program_id(0)"),
    (HEADS, "keys by the weight of the queries", HEADS,
     "x_ptr, key_weight_ptr, out_ptr, H, H + J, stride_head",
     "x_ptr, query_weight_ptr, out_ptr, H, H + J, stride_head"),
    (HEADS, "gradient of keys by the weight of the queries", HEADS,
     "dkey_ptr + row * stride_dkey, x_ptr, key_weight_ptr",
     "dkey_ptr + row * stride_dkey, x_ptr, query_weight_ptr"),
    (HEADS, "turned further instead of back", HEADS,
     "low = turned_low * cos[None, :] + turned_high",
     "low = turned_low * cos[None, :] - turned_high"),
    (HEADS, "mean square over half a head", HEADS, "square / SIZE + eps", "square / HALF + eps"),
    (HEADS, "gradient of values over that of keys", HEADS,
     "to = out_ptr + (head + H + J)", "to = out_ptr + (head + H)"),
    (HEADS, "infinite scale of what lies past the end", HEADS,
     "tl.where(used, tl.rsqrt(square / SIZE + eps), 0.0)", "tl.rsqrt(square / SIZE + eps)"),
    (HEADS, "weights' gradient of the first program alone", HEADS,
     "partial_P2K.sum(0)", "partial_P2K[:1].sum(0)"),
    (HEADS, "kept tensors read twice", LAYER,
     "if held[0] is None", "if ctx.saved_tensors[0] is None"),
    (HEADS, "int32 offset of heads", CONTRACTS,
     "(start + tl.arange(0, BLOCK_H)).to(tl.int64)", "start + tl.arange(0, BLOCK_H)"),
    (GATE, "slope of silu without its second term", GATE, "(1.0 + gate * (1.0 - share))", "1.0"),
    (GATE, "gate and up exchanged", GATE,
     "(gate * tl.sigmoid(gate) * up)", "(up * tl.sigmoid(up) * gate)"),
    (GATE, "overflow before the share is applied", GATE,
     "grad * (gate * share)", "grad * gate * share"),
    (GATE, "a strided gradient read as one piece", GATE, "row * stride_dout", "row * width"),
    (GATE, "the first block of columns alone", GATE, "-(-width // block)", "1"),
]  # fmt: skip


# Which tests meet a file's code soonest, as pytest's -k; the whole suite runs if they see nothing.
SOONEST = {
    "head/odds": "odds",
    "head/rescue": "odds",
    "head/rowmath": "odds",
    "head/rows": "rows",
    "group_advantages": "triton",
    "objectives": "coefficients",
    **dict.fromkeys((NORM, HEADS, GATE), "triton or offsets"),
}


def caught(file: str, suite: str, old: str, new: str) -> tuple[bool, str]:
    """Whether the suite fails on the mutant, and its first failing test."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("intfast", "kernels", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "kernels" / f"{file}.py"
        text = path.read_text()
        assert old in text, f"{file}: the mutant's text is gone: {old}"
        path.write_text(text.replace(old, new, 1))
        dead, how = False, ""
        for some in (["-k", SOONEST.get(file, "plain or (not odds and not rows)")], []):
            if not dead:
                dead, how = fails(copy, [f"tests/test_kernels_{suite}.py", *some])
        return dead, how


def fails(folder: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether a test in `folder` fails, and which one."""
    with tempfile.NamedTemporaryFile("r") as log:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(log.name, os.O_WRONLY), 1)
            os.chdir(folder)
            sys.path[:] = [str(folder), *sys.path[1:]]
            # The fixtures of conftest.py serve other tests, and cost an import of transformers.
            flags = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(folder)]
            code = int(pytest.main([*flags, *tests]))
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = log.read().splitlines()
    first = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "")
    # 1: a test failed; negative: the process died, as an offset into nowhere may make it do
    return code == 1 or code < 0, first or f"exit {code}"


def main(arguments: list[str]) -> int:
    filters = [word for word in arguments if word != "--planted-only"]
    chosen = [m for m in MUTANTS if not filters or any(f in m[0] + m[1] for f in filters)]
    if "--planted-only" not in arguments:
        red, how = fails(
            ROOT, [f"tests/test_kernels_{suite}.py" for suite in {m[2] for m in chosen}]
        )
        if red:
            raise SystemExit(f"expected green suites to plant bugs in, got {how}")
    survivors = []
    for file, note, suite, old, new in chosen:
        start = time.perf_counter()
        dead, how = caught(file, suite, old, new)
        survivors += [] if dead else [note]
        verdict = "caught" if dead else "SURVIVED"
        how = how.split("::")[-1].split(" - ")[0][:70]
        print(f"{verdict:<9}{file:<24}{note:<46}{time.perf_counter() - start:5.0f} s  {how}")
        sys.stdout.flush()
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
