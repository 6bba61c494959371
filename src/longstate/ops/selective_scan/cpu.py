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
    u, dt, A, B, C, initial = (x.contiguous() for x in (u, dt, A, B, C, initial))
    start = None if start is None else start.contiguous()
    y, final = torch.empty_like(u), torch.empty_like(initial)
    chunks = -(-u.shape[1] // CHUNK)
    kept = initial.new_empty(chunks + 1, *initial.shape) if keep else initial.new_empty(0)
    native.kernels.selective_scan(
        *_sizes(u, A),
        *map(native.address, (u, dt, A, B, C, initial, start, y, final, kept if keep else None)),
        native.threads(),
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
    given = [x.contiguous() for x in (u, dt, A, B, C)]
    start = None if start is None else start.contiguous()
    beginnings, grad, grad_final = beginnings.contiguous(), grad.contiguous(), grad_final.contiguous()
    pieces = -(-u.shape[2] // native.kernels.PIECE)
    grad_u, grad_dt, grad_initial = torch.empty_like(given[0]), torch.empty_like(given[1]), torch.empty_like(grad_final)
    grad_A = torch.empty_like(grad_final)
    grad_B, grad_C = (x.new_empty(pieces, *x.shape) for x in given[3:])
    results = (grad_u, grad_dt, grad_A, grad_B, grad_C, grad_initial)
    native.kernels.selective_scan_backward(
        *_sizes(u, A),
        *map(native.address, (*given, start, beginnings, grad, grad_final, *results)),
        native.threads(),
    )
    return grad_u, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_initial


def _sizes(u: Tensor, A: Tensor) -> tuple[int, ...]:
    return (*u.shape, A.shape[1], CHUNK)
