"""The linear recurrence with one fixed matrix."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Float, Tensor
from ...timeline import Compaction, Timeline, zero_where_invalid
from .._register import at_least_float32, call, choose, expect, register
from . import chunked, reference


def matrix_scan(
    A: Float[Tensor, "n n"],
    b: Float[Tensor, "b t n"],
    initial: Float[Tensor, "b n"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t n"], Float[Tensor, "b n"]]:
    """Run the linear recurrence with one fixed matrix for all entries of the state together.

        h_t = A h_{t−1} + b_t

    Args:
        A: The matrix, whose eigenvalues should not be above 1 in size.
        b: Inputs.
        initial: h_0; zero when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Every state ``[b t n]`` in the type of ``b``, and the last one ``[b n]`` in float32 at least.

    Raises:
        ValueError: If shapes do not go together or the backend is not available.

    Source:
        In chunks: Blelloch, "Prefix sums and their applications", 1990.
    """
    batch, length, n = b.shape
    expect("matrix_scan", "A", A, (n, n))
    if initial is not None:
        expect("matrix_scan", "initial", initial, (batch, n))
    dtype = at_least_float32(A, b) if initial is None else at_least_float32(A, b, initial)
    _, start, valid = Timeline(None, start, valid).expand(batch, length)
    backend = choose("matrix_scan", backend)
    h_0 = b.new_zeros(batch, n, dtype=dtype) if initial is None else initial.to(dtype)
    inputs = zero_where_invalid(b, valid).to(dtype)
    if backend == "reference":
        h, final = reference.matrix_scan(A.to(dtype), inputs, h_0, start, valid)
        return h.to(b.dtype), final
    if valid is None:
        h = call("matrix_scan", A.to(dtype), inputs, h_0, start, backend=backend)
        return h.to(b.dtype), torch.cat([h_0[:, None], h[:, -1:]], 1)[:, -1].clone()
    # The steps that count come first, so that the state after them stands behind as many steps as there are of these.
    compaction = Compaction.of(valid)
    start = None if start is None else compaction.start(start)
    h = call("matrix_scan", A.to(dtype), compaction.compact(inputs), h_0, start, backend=backend)
    last = compaction.total[:, None, None].expand(batch, 1, n)
    final = torch.cat([h_0[:, None], h], 1).gather(1, last)[:, 0]
    if start is not None:
        ended = torch.cat([start, torch.zeros_like(h_0[:, :1], dtype=torch.bool)], 1)
        final = final.masked_fill(ended.gather(1, compaction.total[:, None]), 0)
    return compaction.restore(h).to(b.dtype), final


def _fake(A: Tensor, b: Tensor, initial: Tensor, start: Tensor | None) -> Tensor:
    return torch.empty_like(b)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    A, _, initial, start, ctx.backend = inputs
    ctx.save_for_backward(A, initial, start, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Run the same recurrence backwards in time, with the matrix turned over: λ_t = g_t + Aᵀ λ_{t+1}."""
    A, initial, start, h = ctx.saved_tensors
    later = None if start is None else torch.cat([torch.zeros_like(start[:, :1]), start.flip(1)], 1)[:, :-1]
    adjoint = torch.ops.longstate.matrix_scan(A.mT, grad.flip(1), torch.zeros_like(initial), later, ctx.backend).flip(1)
    before, first = torch.cat([initial[:, None], h], 1)[:, :-1], adjoint[:, :1]
    if start is not None:
        before, first = before.masked_fill(start[..., None], 0), first.masked_fill(start[:, :1, None], 0)
    return torch.einsum("btn,btm->nm", adjoint, before), adjoint, first.sum(1) @ A, None, None


register(
    "matrix_scan",
    "Tensor A, Tensor b, Tensor initial, Tensor? start -> Tensor",
    forward={"chunked": chunked.matrix_scan},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
