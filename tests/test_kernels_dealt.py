"""The loss head whose vocabulary is dealt to ranks against the whole one: all paths, all losses."""

import pytest
import torch
from kernels_common import INTERPRETED, PATHS, assert_twice, inputs
from objective_cases import OBJECTIVES, streams_for
from rank_threads import together

from intfast.kernels import truth as definition
from intfast.kernels.head import chunks, dealt, plain, plan
from intfast.kernels.head.plan import IGNORE, Vocabulary
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import CrossEntropy, EntropyBonus, Kl, PolicyClip, Streams, Sum

V = 150
"""No multiple of the ranks, and 42 short of a padded one."""
BOTH = Sum((PolicyClip(0.2, 0.28), Kl(0.1), EntropyBonus(0.02)))


def case(dtype, objective, scale=1.0, T=34, D=24):
    """(hidden, weight, target, streams) of the case; some rows take no part."""
    hidden, weight, target = (
        x.to(dtype) if x.is_floating_point() else x for x in inputs(T, D, V, scale)
    )
    logprob, _ = definition.linear_logprob(hidden, weight, target)
    streams = streams_for(logprob)
    streams.weight_T[[4, 9]] = 0
    target[7], streams.weight_T[7] = IGNORE, 0
    return hidden, weight, target, streams._replace(advantage_T=streams.sequence_T - 0.7)


def vocabulary(rank, size=V):
    share = -(-size // 64) * 64 // rank.tp
    return Vocabulary(rank.tp_rank * share, share, size, rank)


def mine(rank, tensor):
    here = vocabulary(rank)
    return tensor[here.first : here.first + here.share]


def run(hidden, weight, target, streams, objective, **options):
    """(loss, log-probs, entropies, gradients of hidden and weight) of one call."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_objective(hidden, weight, target, objective, streams, temperature=0.7, **options)
    out.loss.backward()
    return [x.detach() for x in out] + [hidden.grad, weight.grad]


def dealt_run(num, hidden, weight, target, streams, objective, **options):
    """The same of `num` ranks: what each found, its part of the weight's gradient at the end."""
    return together(
        num,
        lambda rank: run(
            hidden, mine(rank, weight), target, streams, objective,
            vocabulary=vocabulary(rank), **options,
        ),
    )  # fmt: skip


def apart(found, expected):
    """Largest difference, over the largest that was expected."""
    expected = expected.double()
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def distance(num, dtype, objective, scale, **options):
    """How far ranks are from the whole head; all of them must have the same bits."""
    inputs_of = case(dtype, objective, scale)
    whole = run(*inputs_of, objective, **({"path": options["path"]} if "path" in options else {}))
    ranks = dealt_run(num, *inputs_of, objective, **options)
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][:4], other[:4], strict=True))
    joined = [*ranks[0][:4], torch.cat([found[4] for found in ranks])]
    assert joined[4].shape == whole[4].shape
    return max(apart(a, b) for a, b in zip(joined, whole, strict=True) if b.numel())


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("chunk_bytes", [10**9, 7_000])
def test_every_objective_in_fp64_and_fp32(num, scale, chunk_bytes):
    for objective in OBJECTIVES:
        found = distance(num, torch.float64, objective, scale, chunk_bytes=chunk_bytes)
        assert found < 1e-12, (objective, found)
    found = distance(num, torch.float32, BOTH, scale, chunk_bytes=chunk_bytes)
    assert found < 2e-5, found


@pytest.mark.parametrize("path", [path for path in PATHS if path != "plain"])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_kernels_in_fp32(path, scale):
    objective = BOTH if path == "rows" else Sum(BOTH.parts[:2])
    found = distance(2, torch.float32, objective, scale, path=path, chunk_bytes=3_000)
    assert found < 2e-5, found
    if scale == 1.0:  # beyond, the cap has no digits left, dealt or not
        inputs_of = case(torch.float32, objective)
        whole = run(*inputs_of, objective, path=path, softcap=9.0)
        ranks = dealt_run(2, *inputs_of, objective, path=path, softcap=9.0)
        joined = [*ranks[0][:4], torch.cat([found[4] for found in ranks])]
        assert max(apart(a, b) for a, b in zip(joined, whole, strict=True)) < 2e-5


def test_the_largest_scale_has_rows_beyond_the_exponent():
    hidden, weight, target, _ = case(torch.float64, BOTH, 40.0)
    logit = hidden @ weight.T / 0.7
    above = logit.amax(1) - logit.gather(1, target.clamp_min(0)[:, None])[:, 0]
    assert (above > plain.MAX_EXPONENT).any() and (above < plain.MAX_EXPONENT).any()


@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
def test_log_probs_and_their_gradients(entropy):
    hidden, weight, target, streams = case(torch.float64, BOTH)

    def scored(weight, **options):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.no_grad():
            alone = linear_logprob(h, w, target, entropy=entropy, softcap=5.0, **options)
        found = linear_logprob(
            h, w, target, entropy=entropy, softcap=5.0, chunk_bytes=7_000, **options
        )
        assert apart(alone[0], found[0].detach()) < 1e-12
        total = (found[0] * streams.advantage_T).sum()
        total = total + (found[1].square().sum() if entropy == "gradient" else 0)
        total.backward()
        return [found[0].detach(), h.grad, w.grad]

    whole = scored(weight)
    ranks = together(2, lambda rank: scored(mine(rank, weight), vocabulary=vocabulary(rank)))
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][:2], ranks[1][:2], strict=True))
    joined = [*ranks[0][:2], torch.cat([found[2] for found in ranks])]
    assert max(apart(a, b) for a, b in zip(joined, whole, strict=True)) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_narrow_types_keep_their_budget(path, monkeypatch):
    if path != "plain" and INTERPRETED:
        import kernels_bf16

        kernels_bf16.repair(monkeypatch)
    objective = Sum((PolicyClip(0.2, 0.28), Kl(0.1)))
    inputs_of = case(torch.bfloat16, objective)
    hidden, weight, target, streams = inputs_of
    like = Streams(*(x.double() if x.is_floating_point() else x for x in streams))
    truth = run(hidden.double(), weight.double(), target, like, objective)
    # Eager: whole logits in bfloat16, as autograd makes them.
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob = definition.linear_logprob(h, w, target, temperature=0.7)[0]
    live = streams.weight_T != 0
    terms = objective(logprob.detach(), None, streams)
    slope = torch.where(live, terms.dlogprob_T * streams.weight_T, 0)
    (logprob * slope).sum().backward()
    ranks = dealt_run(2, *inputs_of, objective, path=path, chunk_bytes=3_000)
    eager = [h.grad, w.grad]
    if path != "plain":
        # The kernels keep less of a row than eager does; what they lose must not be more for ranks.
        eager = run(*inputs_of, objective, path=path)[3:]
    assert_twice(ranks[0][3], eager[0], truth[3])
    assert_twice(torch.cat([found[4] for found in ranks]), eager[1], truth[4])
    assert ranks[0][3].dtype == torch.bfloat16 and torch.equal(ranks[0][3], ranks[1][3])


def test_bad_targets_are_refused_by_the_whole_vocabulary():
    hidden, weight, target, streams = case(torch.float32, BOTH)
    target[3] = V - 1  # on the last rank alone
    dealt_run(2, hidden, weight, target, streams, CrossEntropy())
    target[3] = V
    with pytest.raises(ValueError, match=r"0\.\.149, got 150 in row 3"):
        dealt_run(2, hidden, weight, target, streams, CrossEntropy())


def test_nothing_is_as_wide_as_the_vocabulary(monkeypatch):
    seen = []
    sound = chunks._run_gradient

    def watched(kept, *rest):
        seen.append(kept.shape[1])
        return sound(kept, *rest)

    monkeypatch.setattr(chunks, "_run_gradient", watched)
    dealt_run(4, *case(torch.float32, BOTH), BOTH)
    assert sorted(seen) == [6, 48, 48, 48]


# --- mutants -------------------------------------------------------------------------------------


def _everywhere(self, x_CV, value_C):
    plain.Columns.put(self, x_CV, value_C)


MUTANTS = {
    "R is not reduced": (dealt.Columns, "sums", lambda self, r_C, k_C: (r_C, k_C)),
    "-R on every rank": (dealt.Columns, "put", _everywhere),
    "the largest is not reduced": (
        dealt.Columns, "shift", lambda self, u, logit: plain.excess(u.amax(1), logit)
    ),
    "the target's logit is not reduced": (
        dealt.Columns, "logits", lambda self, u: torch.where(
            self.is_mine_C, plain.Columns.logits(self, u), 0
        ),
    ),
    "chunks follow from the own rows": (
        plan, "_bytes_per_row",
        lambda path, weight_VD, rows, sound=plan._bytes_per_row: sound(
            path, weight_VD, len(weight_VD)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(monkeypatch, name):
    where, method, body = MUTANTS[name]
    monkeypatch.setattr(where, method, body)
    try:
        found = distance(2, torch.float64, BOTH, 40.0, chunk_bytes=7_000)
    except AssertionError:
        return
    assert not found < 1e-9, found
