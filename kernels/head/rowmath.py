"""What the Triton kernels of `odds` and `rows` share: jit helpers, formulas there."""

from __future__ import annotations

import triton
import triton.language as tl

from . import plain
from .plan import IGNORE

MAX_EXPONENT = tl.constexpr(plain.MAX_EXPONENT)
IGNORED = tl.constexpr(IGNORE)


@triton.jit
def cap(z, scale, softcap, SOFTCAP: tl.constexpr):
    """The final logit of a raw one; `scale` is 1 / temperature."""
    if SOFTCAP:
        # tanh by the exponential: the interpreter has no libdevice
        z = softcap * (1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0))
    return z * scale


@triton.jit
def cap_slope(z, scale, softcap, SOFTCAP: tl.constexpr):
    """d capped / d raw of a final logit, without the temperature."""
    if SOFTCAP:
        tanh = z / (scale * softcap)
        return 1.0 - tanh * tanh
    else:
        return 1.0


@triton.jit
def log1p(x):
    # tl.log compiles to an approximation with a large relative error near 1, so small arguments
    # take log1p(x) = 2 atanh(x / (2 + x)); the first term left out is below 1e-9 of the sum.
    s = x / (2.0 + x)
    q = s * s
    tail = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
    return tl.where(x < 0.5, 2.0 * s * (1.0 + q * tail), tl.log(1.0 + x))


@triton.jit
def finish(shift, r, k, live):
    """(logprob, entropy) of rows from their sums."""
    own = tl.exp(-shift)
    total = r + own
    log_total = tl.where(shift > 0, tl.log(total), log1p(r))
    logprob = tl.where(live, -(shift + log_total), 0.0)
    return logprob, tl.where(live, log_total - (k - shift * own) / total, 0.0)
