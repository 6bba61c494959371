"""The elementwise linear recurrence."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Inexact, Tensor
from ...timeline import Timeline, zero_where_invalid
from .._register import at_least_float32, call, choose, expect, register
from . import chunked, reference


def scan(
    a: Inexact[Tensor, "..."],
    b: Inexact[Tensor, "b t *n"],
    initial: Inexact[Tensor, "b *n"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Inexact[Tensor, "b t *n"], Inexact[Tensor, "b *n"]]:
    """Run the elementwise linear recurrence.

        h_t = a_t ∘ h_{t−1} + b_t

    Args:
        a: Coefficients, real or complex: ``[*n]`` (fixed) or ``[b t *n]`` (per step).
        b: Inputs, real or complex.
        initial: h_0; zero when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Every state ``[b t *n]`` in the type of ``b``, and the last one ``[b *n]`` in float32 at least.

    Raises:
        ValueError: If shapes do not go together or the backend is not available.

    Source:
        Blelloch, "Prefix sums and their applications", 1990; Martin and Cundy, arXiv:1709.04057.
    """
    expect("scan", "a", a, tuple(b.shape), tuple(b.shape[2:]))
    if initial is not None:
        expect("scan", "initial", initial, (b.shape[0], *b.shape[2:]))
    dtype = at_least_float32(a, b) if initial is None else at_least_float32(a, b, initial)
    output = torch.promote_types(b.dtype, torch.complex32) if dtype.is_complex and not b.is_complex() else b.dtype
    timeline = Timeline(start=start, valid=valid).expand(*b.shape[:2])
    a, b = _masked(a.to(dtype), b.to(dtype), timeline)
    h_0 = b.new_zeros(b.shape[0], *b.shape[2:]) if initial is None else initial.to(dtype)
    backend = choose("scan", backend)
    h, final = reference.scan(a, b, h_0) if backend == "reference" else call("scan", a, b, h_0, backend=backend)
    return zero_where_invalid(h, timeline.valid).to(output), final


def scan_decay(
    a: Inexact[Tensor, "..."], length: int | None = None, *, start: Tensor | None = None, valid: Tensor | None = None
) -> Inexact[Tensor, "..."]:
    """Return the factor between the initial and the final state of ``scan``: the product of its coefficients.

    Args:
        a: Coefficients ``[b t *n]``, or fixed ones ``[*n]`` together with the ``length`` of the call; with fixed
            ones neither ``start`` nor ``valid``.
        length: The number of steps, for fixed coefficients.
        start: Where the state is set to zero before the step.
        valid: Where the step counts.

    Returns:
        ``[b *n]``, or ``[*n]`` for fixed coefficients.

    Raises:
        ValueError: If ``start`` or ``valid`` comes with fixed coefficients.
    """
    if length is not None:
        if start is not None or valid is not None:
            raise ValueError(
                "scan_decay(length=…): start and valid need coefficients for each step. Expand a to [b t …]."
            )
        return a**length
    return _masked(a, a, Timeline(start=start, valid=valid).expand(*a.shape[:2]))[0].prod(1)


def _masked(a: Tensor, b: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
    """Write starts and steps that do not count into the coefficients and inputs."""
    for mask, value in ((timeline.valid, 1), (None if timeline.start is None else ~timeline.start, 0)):
        if mask is not None:
            keep = mask.view(*mask.shape, *[1] * (b.ndim - 2))
            a = torch.where(keep, a, value)
            if value == 1:
                b = torch.where(keep, b, 0)
    return a, b


def _fake(a: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(initial)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, initial, ctx.backend = inputs
    ctx.save_for_backward(a, initial, output[0])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    """λ_t = g_t + ā_{t+1} ∘ λ_{t+1}: the same op, backwards in time; so that it can be differentiated again."""
    a, initial, h = ctx.saved_tensors
    if h.shape[1] == 0:
        return torch.zeros_like(a), grad, grad_final, None
    conjugate, per_step = a.conj().resolve_conj(), a.ndim == h.ndim
    grad = torch.cat([grad[:, :-1], grad[:, -1:] + grad_final[:, None]], 1)
    reversed_a = torch.cat([torch.zeros_like(conjugate[:, :1]), conjugate[:, 1:].flip(1)], 1) if per_step else conjugate
    adjoint = torch.ops.longstate.scan(reversed_a, grad.flip(1), torch.zeros_like(initial), ctx.backend)[0].flip(1)
    grad_a = adjoint * torch.cat([initial[:, None], h[:, :-1]], 1).conj()
    first = conjugate[:, 0] if per_step else conjugate
    return grad_a if per_step else grad_a.sum((0, 1)), adjoint, first * adjoint[:, 0], None


register(
    "scan",
    "Tensor a, Tensor b, Tensor initial -> (Tensor, Tensor)",
    forward={"chunked": chunked.scan},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
