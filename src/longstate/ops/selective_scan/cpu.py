"""The compiled kernel, from Δ's softplus to the gate: states are not written out but for those between tiles of steps,
which the backward pass starts from."""

from __future__ import annotations

from typing import Any

import torch

from ... import native
from ..._shapes import Tensor
from .._register import define, register

TILE = 32  # steps between states that are kept, and that the kernel takes at a time


def refusal(discretization: str, *tensors: Tensor | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    if not native.takes(*tensors):
        return "its kernel takes float32 and bfloat16 on the CPU"
    _, _, _, B, C, *_ = tensors
    if discretization != "zoh-euler" or B is None or B.ndim != 3 or C is None or C.ndim != 3:
        return 'its kernel has the rule "zoh-euler", with B and C for each step'
    return ""


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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t d]``, the final state ``[b d n]`` and the states before the tiles ``[j+1 b d n]``.

    The last are for the backward pass: none are returned unless asked to ``keep`` them.
    """
    assert native.kernels is not None
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
) -> tuple[Tensor, ...]:
    """Return the gradients of u, dt, A, B, C, D, the initial state, gate, dt_bias and elapsed; empty ones where there
    is none."""
    assert native.kernels is not None
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


def register_kernel() -> None:
    """Register the op of the kernel, which computes ``selective_scan`` and what stands around it."""
    tensors = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D"
    around = "Tensor? gate, Tensor? dt_bias, Tensor? elapsed, Tensor? start"
    flags = "bool dt_softplus, bool log_A"
    register(
        "gated_selective_scan",
        f"{tensors}, Tensor? initial, {around}, {flags}, bool keep -> (Tensor, Tensor, Tensor)",
        forward={"cpu": selective_scan},
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        computes="selective_scan",
    )
    define(
        "gated_selective_scan_backward",
        f"Tensor grad, Tensor? grad_final, {tensors}, {around}, Tensor kept, {flags} -> ({', '.join(['Tensor'] * 10)})",
        {"cpu": selective_scan_backward},
        _fake_backward,
    )


def _fake(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    final = A.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    # One more than tiles: tracing makes a promise about an axis that could have one entry.
    tiles = (u.shape[1] + TILE - 1) // TILE + 1
    return torch.empty_like(u), final, final.new_empty(tiles, *final.shape) if rest[-1] else final.new_empty(0)


def _fake_backward(
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
    *_: Any,
) -> tuple[Tensor, ...]:
    wanted = (u, dt, A, B, C, D, kept[0], gate, dt_bias, elapsed)
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.log_A, _, ctx.backend = inputs
    ctx.initial = tensors.pop(6) is not None
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # for the states that are kept, zeros would be memory touched for nothing


def _backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(saved[0])
    gradients = torch.ops.longstate.gated_selective_scan_backward(
        grad, grad_final, *saved, ctx.dt_softplus, ctx.log_A, ctx.backend
    )
    _, _, _, _, _, D, gate, dt_bias, elapsed, *_ = saved
    there = (True,) * 5 + (D is not None, ctx.initial) + tuple(x is not None for x in (gate, dt_bias, elapsed))
    return (*(x if given else None for x, given in zip(gradients, there, strict=True)), *[None] * 5)
