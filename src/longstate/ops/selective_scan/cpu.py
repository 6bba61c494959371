"""The compiled kernel, from Δ's softplus to the gate: states are not written out but for those between tiles of steps,
which the backward pass starts from."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor

TILE = 32  # steps between states that are kept, and that the kernel takes at a time


def refusal(*tensors: Tensor | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    return "" if native.takes(*tensors) else "its kernel takes float32 and bfloat16 on the CPU"


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    elapsed: Tensor | None,
    start: Tensor | None,
    dt_softplus: bool,
    log_A: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t d]``, the final state ``[b d n]`` and the states before tiles of steps ``[j+1 b d n]``.

    The last are for the backward pass, one every ``keep`` steps (``TILE`` here); none where it is 0.
    """
    assert native.kernels is not None and keep in (0, TILE)
    batch, length, width = u.shape
    state = (batch, width, A.shape[1])
    if initial is None:
        initial = torch.zeros(state)
    y, final = native.empty(u.shape, u.dtype), torch.empty(state)
    kept = native.empty((-(-length // TILE) + 1, *state)) if keep else torch.empty(0)
    given = _Given(u, dt, A, B, C, D, initial, gate, dt_bias, elapsed, start)
    native.kernels.selective_scan(
        *given.numbers(dt_softplus, log_A), *native.rows(y), final.data_ptr(), kept.data_ptr() if keep else 0
    )
    return y, final, kept


def selective_scan_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    elapsed: Tensor | None,
    start: Tensor | None,
    kept: Tensor,
    dt_softplus: bool,
    log_A: bool,
    keep: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, dt, A, B, C, D, the initial state, gate, dt_bias and elapsed; empty ones where there
    is none."""
    assert native.kernels is not None and keep in (0, TILE)
    batch, length, width = u.shape
    n = A.shape[1]
    pieces = -(-width // native.kernels.PIECE)
    given = _Given(u, dt, A, B, C, D, None, gate, dt_bias, elapsed, start)
    grad, grad_final, kept = native.in_rows(grad), native.side_by_side(grad_final), kept.contiguous()
    grad_u, grad_dt = native.empty(u.shape, u.dtype), native.empty(dt.shape, dt.dtype)
    grad_gate = None if gate is None else native.empty(gate.shape, gate.dtype)
    grad_A, grad_initial = torch.empty(batch, width, n), torch.empty(batch, width, n)
    grad_D, grad_bias = torch.empty(batch, width), torch.empty(batch, width)
    grad_B, grad_C = torch.empty(pieces, batch, length, n), torch.empty(pieces, batch, length, n)
    grad_elapsed = torch.empty(pieces, batch, length)
    native.kernels.selective_scan_backward(
        *given.numbers(dt_softplus, log_A),
        *native.rows(None),
        0,
        kept.data_ptr(),
        *native.rows(grad),
        native.address(grad_final),
        *native.rows(grad_u),
        *native.rows(grad_dt),
        *native.rows(grad_gate),
        *map(native.address, (grad_A, grad_D, grad_bias, grad_initial, grad_B, grad_C, grad_elapsed)),
    )
    nothing = torch.empty(0)

    def total(x: Tensor, like: Tensor | None) -> Tensor:
        return nothing.clone() if like is None else x.sum(0).to(like.dtype)

    return (
        grad_u,
        grad_dt,
        total(grad_A, A),
        total(grad_B, B),
        total(grad_C, C),
        total(grad_D, D),
        grad_initial,
        nothing.clone() if grad_gate is None else grad_gate,
        total(grad_bias, dt_bias),
        total(grad_elapsed, elapsed),
    )


class _Given:
    """What both kernels begin with, kept alive as long as they run."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        gate: Tensor | None,
        dt_bias: Tensor | None,
        elapsed: Tensor | None,
        start: Tensor | None,
    ) -> None:
        self.sizes = (*u.shape, A.shape[1], TILE)
        self.rows = [None if x is None else native.in_rows(x) for x in (u, dt, gate, B, C)]
        self.A = native.in_rows(A)
        self.vectors = [None if x is None else x.contiguous() for x in (D, dt_bias)]
        self.singles = [native.single(x) for x in (initial, elapsed)]
        self.start = None if start is None else start.contiguous()

    def numbers(self, dt_softplus: bool, log_A: bool) -> list[int]:
        return [
            *(*self.sizes, dt_softplus, log_A, native.threads()),
            *(number for x in self.rows for number in native.rows(x)),
            *native.matrix(self.A),
            *(number for x in self.vectors for number in native.vector(x)),
            *map(native.address, (*self.singles, self.start)),
        ]
