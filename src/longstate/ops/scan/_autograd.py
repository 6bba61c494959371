"""Registration of recurrences that return every state: their gradient is the same recurrence backwards in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..._shapes import Tensor
from .._register import at_least_float32, define, register

Implementations = dict[str, Callable[..., Any]]


def register_recurrence(
    name: str, forward: Implementations, backward: Implementations, portable_backward: Callable[..., Any]
) -> None:
    """Register an op of (a, b, initial, start, valid) → (every state, the last one), and that of its gradient.

    ``portable_backward`` takes ``states``, the recurrence from zero as something that can be differentiated: second
    derivatives go through it.
    """

    def fake(
        a: Tensor, b: Tensor, initial: Tensor | None, start: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(b), b.new_empty(b.shape[0], *b.shape[2:], dtype=at_least_float32(b))

    def fake_backward(grad: Tensor, grad_final: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(a), torch.empty_like(grad), torch.empty_like(grad_final)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, *others, ctx.backend = inputs
        ctx.save_for_backward(a, *others, output[0])

    def differentiate(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        ops = torch.ops.longstate
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        given = (grad, grad_final, *saved)
        if torch.is_grad_enabled():  # these gradients are to be differentiated: a kernel's could not be

            def states(a: Tensor, b: Tensor) -> Tensor:
                return getattr(ops, name)(a, b, None, None, None, ctx.backend)[0]

            grad_a, grad_b, grad_initial = portable_backward(*given, states=states)
        else:
            grad_a, grad_b, grad_initial = getattr(ops, f"{name}_backward")(*given, ctx.backend)
        return grad_a, grad_b, None if saved[1] is None else grad_initial, None, None, None

    register(
        name,
        "Tensor a, Tensor b, Tensor? initial, Tensor? start, Tensor? valid -> (Tensor, Tensor)",
        forward=forward,
        fake=fake,
        setup_context=setup_context,
        backward=differentiate,
    )
    define(
        f"{name}_backward",
        "Tensor grad, Tensor grad_final, Tensor a, Tensor? initial, Tensor? start, Tensor? valid, Tensor h"
        " -> (Tensor, Tensor, Tensor)",
        backward,
        fake_backward,
    )
