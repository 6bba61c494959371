"""The linear recurrence of small matrices."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Inexact, Tensor
from ...timeline import Timeline
from .._register import at_least_float32, call, choose, define, expect, register
from . import chunked, reference


def block_scan(
    a: Inexact[Tensor, "..."],
    b: Inexact[Tensor, "b t n k p"],
    initial: Inexact[Tensor, "b n k p"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Inexact[Tensor, "b t n k p"], Inexact[Tensor, "b n k p"]]:
    """Run a linear recurrence whose matrix is made of n small blocks.

        h_t = a_t h_{t−1} + b_t,    a_t: n matrices [k k]

    ``scan`` is the case of blocks of one number. The matrices need no eigenvectors.

    Args:
        a: Matrices, real or complex: ``[n k k]`` (fixed) or ``[b t n k k]`` (per step).
        b: Inputs, real or complex, in p columns that are multiplied alike.
        initial: h_0; zero when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Every state ``[b t n k p]`` in the type of ``b``, and the last one ``[b n k p]`` in float32 at least.

    Raises:
        ValueError: If shapes do not go together or the backend is not available.

    Source:
        Blelloch, "Prefix sums and their applications", 1990.
    """
    batch, length, blocks, size, _ = b.shape
    expect("block_scan", "a", a, (blocks, size, size), (batch, length, blocks, size, size))
    if initial is not None:
        expect("block_scan", "initial", initial, (batch, *b.shape[2:]))
    dtype = at_least_float32(a, b) if initial is None else at_least_float32(a, b, initial)
    output = torch.promote_types(b.dtype, torch.complex32) if dtype.is_complex and not b.is_complex() else b.dtype
    if start is not None or valid is not None:
        _, start, valid = Timeline(None, start, valid).expand(batch, length)
    backend = choose("block_scan", backend)
    a, b = a.to(dtype), b.to(dtype)
    initial = None if initial is None else initial.to(dtype)
    if backend == "reference":
        h_0 = b.new_zeros(batch, *b.shape[2:]) if initial is None else initial
        h, final = reference.block_scan(a, b, h_0, start, valid)
    else:
        h, final = call("block_scan", a, b, initial, start, valid, backend=backend)
    return h.to(output), final


def _fake(
    a: Tensor, b: Tensor, initial: Tensor | None, start: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), b.new_empty(b.shape[0], *b.shape[2:])


def _fake_backward(grad: Tensor, grad_final: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(grad), torch.empty_like(grad_final)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, *others, ctx.backend = inputs
    ctx.save_for_backward(a, *others, output[0])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    given = (grad, grad_final, *saved)
    if torch.is_grad_enabled():  # these gradients are to be differentiated

        def states(a: Tensor, b: Tensor) -> Tensor:
            return torch.ops.longstate.block_scan(a, b, None, None, None, ctx.backend)[0]

        grad_a, grad_b, grad_initial = chunked.block_scan_backward(*given, states=states)
    else:
        grad_a, grad_b, grad_initial = torch.ops.longstate.block_scan_backward(*given, ctx.backend)
    return grad_a, grad_b, None if saved[1] is None else grad_initial, None, None, None


register(
    "block_scan",
    "Tensor a, Tensor b, Tensor? initial, Tensor? start, Tensor? valid -> (Tensor, Tensor)",
    forward={"chunked": chunked.block_scan},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "block_scan_backward",
    "Tensor grad, Tensor grad_final, Tensor a, Tensor? initial, Tensor? start, Tensor? valid, Tensor h"
    " -> (Tensor, Tensor, Tensor)",
    {"chunked": chunked.block_scan_backward},
    _fake_backward,
)
