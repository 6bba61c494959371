"""The product with a matrix by torch; int8 weights are never whole in a wider type."""

from __future__ import annotations

import torch
from torch.nn import functional

from ... import native
from ..._shapes import Tensor
from .._register import unobserved

CHUNK = 2**21  # weights that are widened at a time
LARGE = 2**21  # numbers of a result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Return what ``reference.linear`` returns."""
    if dtype is not None:
        y = linear(x, weight, None, scale, None).to(dtype)
        return y if bias is None else y + bias.to(dtype)
    if scale is None:
        return _large(x, weight) if bias is None and _is_large(x, weight) else functional.linear(x, weight, bias)
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    biases = [None] * len(weight) if bias is None else bias.split(rows)
    parts = zip(weight.split(rows), scale.split(rows), biases, strict=False)
    return torch.cat([functional.linear(x, widened(q, s, x.dtype), b) for q, s, b in parts], -1)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Return whether the result is worth memory in large pages, which no gradient or trace would see it take."""
    if native.kernels is None or not unobserved(x, weight) or torch.is_autocast_enabled("cpu"):
        return False
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or x.dtype is not weight.dtype:
        return False
    return x.shape[-1] == weight.shape[1] and x.numel() * len(weight) >= LARGE * weight.shape[1]


def _large(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply into memory whose first use costs a third of torch's own."""
    y = native.empty((*x.shape[:-1], len(weight)), x.dtype)
    torch.mm(x.flatten(0, -2), weight.mT, out=y.flatten(0, -2))
    return y


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int8 weights ``[… o i]`` times their scales ``[… o groups]``, in a wider type."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = scale.shape[-1]
    w = weight.unflatten(-1, (groups, weight.shape[-1] // groups)).to(wide) * scale[..., None].to(wide)
    return w.flatten(-2).to(dtype)
