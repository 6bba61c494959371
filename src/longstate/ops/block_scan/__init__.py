"""The linear recurrence of small matrices."""

from __future__ import annotations

import torch

from ..._shapes import Bool, Inexact, Tensor
from ...timeline import Timeline
from .._register import at_least_float32, call, choose, expect
from ..scan._autograd import register_recurrence
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


register_recurrence(
    "block_scan", {"chunked": chunked.block_scan}, {"chunked": chunked.block_scan_backward}, chunked.block_scan_backward
)
