# mypy: ignore-errors
"""What kernels of several ops are made of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Return 1/(1 + e^−x), with no exponent above zero."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def slope_of_silu(x):
    """Return σ (1 + x (1 − σ)); beyond 104, where σ is 0 or 1, without a product of infinity and 0."""
    return sigmoid(x) * (1 + tl.minimum(tl.maximum(x, -104.0), 104.0) * sigmoid(-x))
