"""The product with a matrix by torch; int8 weights are never whole in a wider type."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ... import native
from ..._shapes import Tensor
from .._register import untraced

CHUNK = 2**21  # weights that are widened at a time
LARGE = 2**22  # bytes of a result, or of a gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Return what ``reference.linear`` returns."""
    if dtype is not None:
        y = linear(x, weight, None, scale, None).to(dtype)
        return y if bias is None else y + bias.to(dtype)
    if scale is None:
        if bias is None and _is_large(x, weight):
            return _Product.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))
        return functional.linear(x, weight, bias)
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    biases = [None] * len(weight) if bias is None else bias.split(rows)
    parts = zip(weight.split(rows), scale.split(rows), biases, strict=False)
    return torch.cat([functional.linear(x, widened(q, s, x.dtype), b) for q, s, b in parts], -1)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Return whether the result or a gradient is worth memory in large pages, which no trace would see it take."""
    if native.kernels is None or not untraced(x, weight) or torch.is_autocast_enabled("cpu"):
        return False
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or x.dtype is not weight.dtype:
        return False
    if x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        return False
    count = x.numel() // max(1, weight.shape[1]) * len(weight)
    if torch.is_grad_enabled():
        count = max(count, x.requires_grad * x.numel(), weight.requires_grad * weight.numel())
    return count * x.itemsize >= LARGE


class _Product(torch.autograd.Function):
    """a bᵀ in memory whose first use costs a third of torch's own; so are its gradients, which are such products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Return a bᵀ of ``[m k]`` and ``[n k]``."""
        ctx.save_for_backward(a, b)
        return torch.mm(a, b.mT, out=native.empty((len(a), len(b)), a.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of a and b, which can be differentiated once more."""
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return (
            _Product.apply(grad, b.mT) if of_a else None,
            _Product.apply(grad.mT, a.mT) if of_b else None,
        )


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int8 weights ``[… o i]`` times their scales ``[… o groups]``, in a wider type."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = scale.shape[-1]
    w = weight.unflatten(-1, (groups, weight.shape[-1] // groups)).to(wide) * scale[..., None].to(wide)
    return w.flatten(-2).to(dtype)
