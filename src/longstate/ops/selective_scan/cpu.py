"""The compiled kernel: states never written out but for those between chunks, which the backward pass starts from."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor
from .chunked import CHUNK


def refusal(u: Tensor, A: Tensor, B: Tensor, C: Tensor, discretization: str) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    if u.device.type != "cpu" or A.dtype != torch.float32:
        return "its kernel computes in float32 on the CPU"
    if discretization != "zoh-euler" or B.ndim != 3 or C.ndim != 3:
        return 'its kernel has the rule "zoh-euler", with B and C for each step'
    return ""


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    start: Tensor | None,
    discretization: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``chunked.selective_scan`` returns."""
    assert native.kernels is not None
    y, final = torch.empty(u.shape, dtype=u.dtype), torch.empty(initial.shape)
    chunks = -(-u.shape[1] // CHUNK)
    kept = initial.new_empty(chunks + 1, *initial.shape) if keep else initial.new_empty(0)
    _alive, arguments = _given(u, dt, A, B, C, initial.contiguous(), start)
    native.kernels.selective_scan(
        *arguments, *native.rows(y), native.address(final), native.address(kept if keep else None)
    )
    return y, final, kept


def selective_scan_backward(
    grad: Tensor,
    grad_final: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None,
    beginnings: Tensor,
    discretization: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, dt, A, B, C and the initial state."""
    assert native.kernels is not None
    _alive, arguments = _given(u, dt, A, B, C, None, start)
    beginnings, grad, grad_final = beginnings.contiguous(), native.in_rows(grad), grad_final.contiguous()
    pieces = -(-u.shape[2] // native.kernels.PIECE)
    grad_u, grad_dt = (torch.empty(x.shape, dtype=x.dtype) for x in (u, dt))
    grad_A, grad_initial = torch.empty(grad_final.shape), torch.empty(grad_final.shape)
    grad_B, grad_C = (x.new_empty(pieces, *x.shape) for x in (B, C))
    native.kernels.selective_scan_backward(
        *arguments,
        *native.rows(None),
        0,
        native.address(beginnings),
        *native.rows(grad),
        native.address(grad_final),
        *native.rows(grad_u),
        *native.rows(grad_dt),
        *map(native.address, (grad_A, grad_B, grad_C, grad_initial)),
    )
    return grad_u, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_initial


def _given(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, start: Tensor | None
) -> tuple[list[Tensor], list[int]]:
    """Return the tensors that must stay alive, and what the kernels begin with."""
    given = [native.in_rows(x) for x in (u, dt, B, C)]
    A = A.contiguous()
    start = None if start is None else start.contiguous()
    alive = [*given, A, *(x for x in (initial, start) if x is not None)]
    sizes = [*u.shape, A.shape[1], CHUNK, native.threads()]
    where = [number for x in given for number in native.rows(x)]
    return alive, [*sizes, *where, *map(native.address, (A, initial, start))]
