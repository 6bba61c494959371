"""The compiled short convolution: with bias, activation and window, one pass over the inputs each way."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor


def refusal(u: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    if not native.takes(u, weight, bias):
        return "its kernel takes float32 and bfloat16 on the CPU"
    if native.kernels is not None and weight.shape[1] > native.kernels.MOST_TAPS:
        return f"its kernel takes at most {native.kernels.MOST_TAPS} taps"
    return ""


def short(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return outputs and the final window."""
    assert native.kernels is not None
    y = _to_fill(u, valid)
    if initial is None:
        final = torch.empty((u.shape[0], weight.shape[1] - 1, u.shape[2]), dtype=u.dtype)
    else:
        final = native.like(initial)
    _alive, arguments = _given(u, weight, bias, initial, start, valid, silu)
    native.kernels.short_convolution(*arguments, *native.rows(y), *native.rows(final))
    return y, final


def short_backward(
    grad: Tensor,
    grad_final: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, weight, bias and initial window, those of what is absent empty."""
    assert native.kernels is not None
    grad, grad_final = native.in_rows(grad), native.in_rows(grad_final)
    grad_u = _to_fill(u, valid)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype)
    grad_bias, grad_initial = (
        torch.empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (bias, initial)
    )
    _alive, arguments = _given(u, weight, bias, initial, start, valid, silu)
    native.kernels.short_convolution_backward(
        *arguments,
        *native.rows(None),
        *native.rows(None),
        *native.rows(grad),
        *native.rows(grad_final),
        *native.rows(grad_u),
        *native.matrix(grad_weight),
        *native.vector(grad_bias),
        *native.rows(None if initial is None else grad_initial),
    )
    return grad_u, grad_weight, grad_bias, grad_initial


def _to_fill(u: Tensor, valid: Tensor | None) -> Tensor:
    """The kernels do not come to steps that do not count."""
    return native.like(u) if valid is None else torch.zeros(u.shape, dtype=u.dtype)


def _given(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    silu: bool,
) -> tuple[list[Tensor | None], list[int]]:
    """Return the tensors that must stay alive, and what the kernels begin with."""
    u, weight = native.in_rows(u), native.in_rows(weight)
    if bias is not None:
        bias = bias.contiguous()
    if initial is not None:
        initial = native.in_rows(initial)
    if start is not None:
        start = start.contiguous()
    if valid is not None:
        valid = valid.contiguous()
    numbers = [*u.shape, weight.shape[1], silu, native.threads(), *native.rows(u), *native.matrix(weight)]
    numbers += [*native.vector(bias), *native.rows(initial), native.address(start), native.address(valid)]
    return [u, weight, bias, initial, start, valid], numbers
