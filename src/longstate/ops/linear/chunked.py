"""The product with a matrix by torch; int8 weights are never whole in a wider type."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..._shapes import Tensor

CHUNK = 2**21  # weights that are widened at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Return what ``reference.linear`` returns."""
    if dtype is not None:
        y = linear(x, weight, None, scale, None).to(dtype)
        return y if bias is None else y + bias.to(dtype)
    if scale is None:
        return functional.linear(x, weight, bias)
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    biases = [None] * len(weight) if bias is None else bias.split(rows)
    parts = zip(weight.split(rows), scale.split(rows), biases, strict=False)
    return torch.cat([functional.linear(x, widened(q, s, x.dtype), b) for q, s, b in parts], -1)


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int8 weights ``[… o i]`` times their scales ``[… o groups]``, in a wider type."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = scale.shape[-1]
    w = weight.unflatten(-1, (groups, weight.shape[-1] // groups)).to(wide) * scale[..., None].to(wide)
    return w.flatten(-2).to(dtype)
