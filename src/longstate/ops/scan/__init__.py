"""The elementwise linear recurrence."""

from __future__ import annotations

import torch

from ..._shapes import Bool, Inexact, Tensor
from ...timeline import Timeline
from .. import _triton
from .._register import at_least_float32, call, choose, expect, with_kernel
from . import chunked, cpu, reference
from ._autograd import register_recurrence


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
    output = b.dtype
    if dtype.is_complex and not b.is_complex():
        output = torch.promote_types(b.dtype, torch.complex32)
    if start is not None or valid is not None:
        _, start, valid = Timeline(None, start, valid).expand(*b.shape[:2])
    types = (*_triton.TYPES, torch.complex64)
    refusals = {"cpu": cpu.refusal(a, b, dtype), "triton": _triton.refusal(a, b, initial, types=types)}
    backend = choose("scan", backend, refusals)
    if backend not in ("cpu", "triton") or dtype.is_complex:
        a, b = a.to(dtype), b.to(dtype)
    if initial is not None:
        initial = initial.to(dtype)
    if backend == "reference":
        h_0 = b.new_zeros(b.shape[0], *b.shape[2:]) if initial is None else initial
        h, final = reference.scan(a, b, h_0, start, valid)
    else:
        h, final = call("scan", a, b, initial, start, valid, backend=backend)
    return h.to(output), final


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
    return chunked.masked(a, a, *Timeline(None, start, valid).expand(*a.shape[:2])[1:])[0].prod(1)


register_recurrence(
    "scan",
    with_kernel(cpu.scan, chunked.scan, "scan.scan"),
    with_kernel(cpu.scan_backward, chunked.scan_backward, "scan.scan_backward"),
    chunked.scan_backward,
)
