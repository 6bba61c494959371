"""The recurrence of small matrices by odd–even reduction, as that of numbers in ``scan``: O(t) work in 2 log₂ t passes.

Only products of matrices appear, neither quotients nor eigenvectors: they may be singular, or have too few of these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..._shapes import Tensor
from ...timeline import zero_where_invalid
from ..scan.chunked import before_each, over


def block_scan(
    a: Tensor, b: Tensor, initial: Tensor | None, start: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return every state ``[b t n k p]``, zero where a step does not count, and the last one; ``a`` is ``[n k k]`` or
    ``[b t n k k]``."""
    initial = b.new_zeros(b.shape[0], *b.shape[2:]) if initial is None else initial
    if b.shape[1] == 0:
        return torch.empty_like(b), initial.clone()
    a, b = _masked(a, b, start, valid)
    first = a[:, :1] if a.ndim == b.ndim else a
    h = _states(a, torch.cat([first @ initial[:, None] + b[:, :1], b[:, 1:]], 1))
    return zero_where_invalid(h, valid), h[:, -1].clone()


def block_scan_backward(
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

        λ_t = g_t + a_{t+1}* λ_{t+1},    ∂a_t = λ_t h_{t−1}*

    That is the same recurrence backwards in time: with ``states`` that can be differentiated, this can be.
    """
    dtype, length, wide = grad_final.dtype, h.shape[1], h.to(grad_final.dtype)
    if length == 0:
        return torch.zeros_like(a), torch.zeros_like(h), grad_final.clone()
    adjoint_a, grad = _masked(a.mH.resolve_conj().to(dtype), grad.to(dtype), start, valid)
    grad = torch.cat([grad[:, :-1], grad[:, -1:] + grad_final[:, None]], 1)
    per_step = adjoint_a.ndim == h.ndim
    behind = torch.cat([torch.zeros_like(adjoint_a[:, :1]), adjoint_a[:, 1:].flip(1)], 1) if per_step else adjoint_a
    adjoint = (states or _states)(behind, grad.flip(1)).flip(1)
    before = before_each(wide, initial, start, valid)
    for mask in (valid, None if start is None else ~start):
        before = zero_where_invalid(before, mask)
    each = "btnip,btnjp->nij" if a.ndim < h.ndim else "btnip,btnjp->btnij"
    grad_a = torch.einsum(each, adjoint, before.conj())
    grad_initial = (adjoint_a[:, 0] if per_step else adjoint_a) @ adjoint[:, 0]
    return grad_a.to(a.dtype), zero_where_invalid(adjoint, valid).to(h.dtype), grad_initial


def _masked(a: Tensor, b: Tensor, start: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write starts and steps that do not count into the matrices and inputs."""
    if valid is not None:
        a = torch.where(over(valid, b), a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))
        b = torch.where(over(valid, b), b, 0)
    if start is not None:
        a = torch.where(over(start, b), 0, a)
    return a, b


def _states(a: Tensor, b: Tensor) -> Tensor:
    """Return the states from a zero initial state, for at least one step."""
    # With the entries of a matrix far apart, the blocks of all steps lie side by side: long loops, not loops over two.
    each = a.permute(3, 4, 0, 1, 2) if a.ndim == b.ndim else a.permute(1, 2, 0)[:, :, None, None]
    return _odd_even(each.contiguous(), b.permute(3, 4, 0, 1, 2).contiguous()).permute(2, 3, 4, 0, 1)


def _odd_even(a: Tensor, b: Tensor) -> Tensor:
    """Return the states of ``[k k b t n]`` (or ``[k k 1 1 n]``) and ``[k p b t n]``."""
    length = b.shape[3]
    if length == 1:
        return b
    per_step = a.shape[3] == length
    a_odd, a_even, a_next = (a[..., 1::2, :], a[..., : length - 1 : 2, :], a[..., 2::2, :]) if per_step else (a, a, a)
    pairs = b[..., 1::2, :] + _product(a_odd, b[..., : length - 1 : 2, :])
    h_odd = _odd_even(_product(a_odd, a_even), pairs)
    h = torch.empty_like(b)
    h[..., 0, :] = b[..., 0, :]
    h[..., 1::2, :] = h_odd
    h[..., 2::2, :] = b[..., 2::2, :] + _product(a_next, h_odd[..., : (length - 1) // 2, :])
    return h


def _product(a: Tensor, x: Tensor) -> Tensor:
    """Return the products of matrices whose entries come first, one column of ``a`` after the other."""
    result = a[:, 0, None] * x[0]
    for j in range(1, len(x)):
        result = torch.addcmul(result, a[:, j, None], x[j])
    return result
