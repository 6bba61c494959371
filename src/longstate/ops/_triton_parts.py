# mypy: ignore-errors
"""What kernels of several ops are made of."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """Return 1/(1 + e^−x), with no exponent above zero."""
    e = tl.exp2(-LOG2E * tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def slope_of_silu(x):
    """Return σ (1 + x (1 − σ)); beyond 104, where σ is 0 or 1, without a product of infinity and 0."""
    return sigmoid(x) * (1 + tl.minimum(tl.maximum(x, -104.0), 104.0) * sigmoid(-x))


@triton.jit
def softplus(x):
    """Return log(1 + eˣ) = max(x, 0) + 2 artanh(e/(2 + e)) for e = e^−|x|, to the last digits also where it is small:
    the series ends where (1/3)¹⁶/17 is nothing beside one."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    q = s * s
    p = q * (1 / 15) + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return tl.maximum(x, 0.0) + 2 * (s + s * q * p)
