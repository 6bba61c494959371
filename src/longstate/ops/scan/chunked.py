"""The recurrence by odd–even reduction: O(t) work in 2 log₂ t passes over whole tensors.

Neighbours are combined in pairs, h_{2i+1} = (a_{2i+1} a_{2i}) ∘ h_{2i−1} + (a_{2i+1} b_{2i} + b_{2i+1}); that is the
same recurrence at half the length. Its states are every second one, and one product each gives those between
(Blelloch, 1990). Only products of coefficients appear, never quotients, so that zeros and small coefficients are as
exact as in the loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..._shapes import Tensor
from ...timeline import zero_where_invalid


def scan(
    a: Tensor, b: Tensor, initial: Tensor | None, start: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return every state ``[b t …]``, zero where a step does not count, and the last one; ``a`` is ``[…]`` or
    ``[b t …]``."""
    initial = b.new_zeros(b.shape[0], *b.shape[2:]) if initial is None else initial
    if b.shape[1] == 0:
        return torch.empty_like(b), initial.clone()
    a, b = masked(a, b, start, valid)
    b = torch.cat([(a[:, :1] if a.ndim == b.ndim else a) * initial[:, None] + b[:, :1], b[:, 1:]], 1)
    h = odd_even(a, b)
    return zero_where_invalid(h, valid), h[:, -1].clone()


def scan_backward(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    h: Tensor,
    *,
    states: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and the initial state; ``h`` is what was returned.

        λ_t = g_t + ā_{t+1} ∘ λ_{t+1},    ∂a_t = λ_t ∘ h̄_{t−1}

    That is the same recurrence backwards in time: with ``states`` that can be differentiated, this can be.
    """
    dtype, length, wide = grad_final.dtype, h.shape[1], h.to(grad_final.dtype)
    if length == 0:
        return torch.zeros_like(a), torch.zeros_like(h), grad_final.clone()
    conjugate, grad = masked(a.conj().resolve_conj().to(dtype), grad.to(dtype), start, valid)
    grad = torch.cat([grad[:, :-1], grad[:, -1:] + grad_final[:, None]], 1)
    per_step = conjugate.ndim == h.ndim
    reversed_a = torch.cat([torch.zeros_like(conjugate[:, :1]), conjugate[:, 1:].flip(1)], 1) if per_step else conjugate
    adjoint = (states or odd_even)(reversed_a, grad.flip(1)).flip(1)
    grad_a = adjoint * before_each(wide, initial, start, valid).conj()
    for mask in (valid, None if start is None else ~start):
        grad_a = zero_where_invalid(grad_a, mask)
    grad_initial = (conjugate[:, 0] if per_step else conjugate) * adjoint[:, 0]
    grad_a = grad_a.sum((0, 1)) if a.ndim < h.ndim else grad_a
    return grad_a.to(a.dtype), zero_where_invalid(adjoint, valid).to(h.dtype), grad_initial


def masked(a: Tensor, b: Tensor, start: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write starts and steps that do not count into the coefficients and inputs."""
    if valid is not None:
        a, b = torch.where(over(valid, b), a, 1), torch.where(over(valid, b), b, 0)
    if start is not None:
        a = torch.where(over(start, b), 0, a)
    return a, b


def before_each(h: Tensor, initial: Tensor | None, start: Tensor | None, valid: Tensor | None) -> Tensor:
    """Return the state before each step, were it not for starts there."""
    first = torch.zeros_like(h[:, :1]) if initial is None else initial[:, None]
    states = torch.cat([first, h[:, :-1]], 1)
    if valid is None:
        return states
    # Where a step does not count h is zero, and the state is that of the last one which did, or which began anew.
    there = (valid if start is None else valid | start)[:, :-1]
    last = torch.where(there, torch.arange(1, h.shape[1], device=h.device), 0).cummax(1).values
    last = torch.cat([torch.zeros_like(valid[:, :1], dtype=last.dtype), last], 1)
    return states.gather(1, over(last, h).expand(h.shape))


def over(mask: Tensor, x: Tensor) -> Tensor:
    """Return ``[b t]`` with axes for the rest of ``[b t …]``."""
    return mask.view(*mask.shape, *[1] * (x.ndim - 2))


def odd_even(a: Tensor, b: Tensor) -> Tensor:
    """Return the states from a zero initial state, for at least one step."""
    length = b.shape[1]
    if length == 1:
        return b
    per_step = a.ndim == b.ndim
    a_odd, a_next = (a[:, 1::2], a[:, 2::2]) if per_step else (a, a)
    pairs = torch.addcmul(b[:, 1::2], a_odd, b[:, : length - 1 : 2])
    h_odd = odd_even(a_odd * a[:, : length - 1 : 2] if per_step else a * a, pairs)
    h = torch.empty_like(b)
    h[:, 0] = b[:, 0]
    h[:, 1::2] = h_odd
    if length > 2:
        torch.addcmul(b[:, 2::2], a_next, h_odd[:, : (length - 1) // 2], out=h[:, 2::2])
    return h
