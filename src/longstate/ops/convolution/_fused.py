"""The op of the kernels, whatever they are compiled for: window, taps, bias and activation in one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..._shapes import Tensor
from .._register import define, register, twice

Implementations = dict[str, Callable[..., Any]]
MOST_TAPS = 16  # of the kernel for GPUs, which keeps a window in registers


def register_kernel(forward: Implementations, backward_kernels: Implementations, portable: Callable[..., Any]) -> None:
    """Register the op of kernels, which compute ``short_convolution`` and what stands around it.

    Args:
        forward: The backends.
        backward_kernels: Those of its gradient.
        portable: The same by operations of torch's, for gradients that are to be differentiated.
    """

    def backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        given, nothing = ctx.saved_tensors, (None, None)
        if torch.is_grad_enabled():
            return (*twice(lambda: portable(*given, ctx.silu), given, (grad, grad_final)), *nothing)
        gradients = torch.ops.longstate.activated_short_convolution_backward(
            grad, grad_final, *given, ctx.silu, ctx.backend
        )
        found = (None if x is None else g for x, g in zip(given[:4], gradients, strict=True))
        return (*found, None, None, *nothing)

    schema = "Tensor u, Tensor weight, Tensor? bias, Tensor? initial, Tensor? start, Tensor? valid, bool silu"
    register(
        "activated_short_convolution",
        f"{schema} -> (Tensor, Tensor)",
        forward=forward,
        fake=_fake,
        setup_context=_setup_context,
        backward=backward,
        computes="short_convolution",
    )
    define(
        "activated_short_convolution_backward",
        f"Tensor grad, Tensor grad_final, {schema} -> (Tensor, Tensor, Tensor, Tensor)",
        backward_kernels,
        _fake_backward,
    )


def _fake(u: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(u.shape[0], weight.shape[1] - 1, u.shape[2])


def _fake_backward(
    grad: Tensor, grad_final: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, weight, bias, initial))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
