"""The compiled norm, with its weight and gate; statistics are computed again for the backward pass."""

from __future__ import annotations

import math

import torch

from ... import native
from ..._shapes import Tensor


def refusal(x: Tensor, weight: Tensor | None, gate: Tensor | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    return "" if native.takes(x, weight, gate) else "its kernel takes float32 and bfloat16 on the CPU"


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> Tensor:
    """Return what ``reference.rms_norm`` returns."""
    assert native.kernels is not None
    y = native.like(x) if weight is None or weight.dtype == x.dtype else native.empty(x.shape, weight.dtype)
    _alive, arguments = _given(x, weight, gate, eps, groups, offset, norm_before_gate)
    native.kernels.rms_norm(*arguments, *_rows_of(y))
    return y


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and gate, those of what is absent empty."""
    assert native.kernels is not None
    given = (x, weight, gate)
    grad_x, grad_weight, grad_gate = (torch.empty(0) if y is None else native.like(y) for y in given)
    _alive, arguments = _given(x, weight, gate, eps, groups, offset, norm_before_gate)
    grad = _in_rows(grad)
    native.kernels.rms_norm_backward(
        *arguments,
        *native.rows(None),
        *native.rows(grad),
        *_rows_of(grad_x),
        *native.vector(grad_weight),
        *(native.rows(None) if gate is None else _rows_of(grad_gate)),
    )
    return grad_x, grad_weight, grad_gate


def _in_rows(x: Tensor) -> Tensor:
    """Return ``[… d]`` as ``[b t d]``, without a copy where its strides allow."""
    if x.ndim != 3:
        x = x.reshape(math.prod(x.shape[:-2]), *([1] * (2 - x.ndim)), *x.shape[-2:])
    return native.in_rows(x)


def _rows_of(x: Tensor) -> tuple[int, int, int, bool]:
    """Return how a kernel finds the rows of a new ``[… d]``, all at one distance."""
    shape = x.shape
    width = shape[-1]
    return x.data_ptr(), shape[-2] * width if len(shape) > 1 else width, width, x.dtype is torch.bfloat16


def rounds(weight: Tensor | None, gated_after: bool, offset: float) -> bool:
    """Return whether what was normed is rounded before the weight meets it, as published models of a narrow type have
    it."""
    return weight is not None and weight.dtype == torch.bfloat16 and not gated_after and not offset


def _given(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> tuple[list[Tensor | None], list[float]]:
    """Return the tensors that must stay alive, and what the kernels begin with."""
    x = _in_rows(x)
    weight = None if weight is None else weight.contiguous()
    gate = None if gate is None else _in_rows(gate)
    rounded = rounds(weight, gate is not None and norm_before_gate, offset)
    sizes = [*x.shape, groups, not norm_before_gate, rounded, native.threads(), float(eps), float(offset)]
    return [x, weight, gate], [*sizes, *native.rows(x), *native.vector(weight), *native.rows(gate)]
