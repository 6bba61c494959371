"""The selective recurrence chunk by chunk: no tensor over all of b, t, d and n exists at any time.

Within a chunk the states are computed by odd–even reduction and thrown away after their output; only the state at each
chunk's beginning is kept. The backward pass goes through the chunks from the last to the first and recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..._shapes import Tensor
from ..scan.chunked import odd_even
from .discretization import coefficients, derivatives

CHUNK = 32  # steps whose states exist at the same time; kept beginnings take n/32 of the memory of u


class _Chunk(NamedTuple):
    """What a chunk needs, shaped for ``[b c d n]``."""

    u: Tensor
    dt: Tensor
    z: Tensor
    B: Tensor
    C: Tensor
    keep: Tensor | None

    def states(self, before: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return all states, the decays that led to them, these without starts, and φ."""
        within, phi = coefficients(self.z, rule)
        decay = within if self.keep is None else within * self.keep
        h = self.B * (self.dt * self.u)
        if phi is not None:
            h = h * phi
        h[:, 0] += decay[:, 0] * before
        return odd_even(decay, h), decay, within, phi


def _chunks(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None, backwards: bool = False
) -> Iterator[tuple[slice, _Chunk]]:
    beginnings = range(0, u.shape[1], CHUNK)
    for i in reversed(beginnings) if backwards else beginnings:
        at = slice(i, min(i + CHUNK, u.shape[1]))
        step = dt[:, at, :, None]
        b, c = (x[:, at, None] if x.ndim == 3 else x for x in (B, C))
        keep = None if start is None else (~start[:, at, None, None]).to(u.dtype)
        yield at, _Chunk(u[:, at, :, None], step, step * A, b, c, keep)


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
    """Return outputs ``[b t d]``, the final state ``[b d n]`` and the states around the chunks ``[j+1 b d n]``.

    The last are for the backward pass: none are returned unless asked to ``keep`` them.
    """
    y, h, kept = torch.empty_like(u), initial, [initial]
    for at, chunk in _chunks(u, dt, A, B, C, start):
        states, *_ = chunk.states(h, discretization)
        h = states[:, -1].clone()  # a copy, so that the chunk's states can go
        y[:, at] = _readout(states, C[:, at] if C.ndim == 3 else C)
        if keep:
            kept.append(h)
    return y, h.clone(), torch.stack(kept) if keep else initial.new_empty(0)


def _readout(h: Tensor, C: Tensor) -> Tensor:
    if C.ndim == 3 and not h.is_complex():
        return (h @ C[..., None]).squeeze(-1)
    y = (h * (C[:, :, None] if C.ndim == 3 else C)).sum(-1)
    return 2 * y.real if y.is_complex() else y


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
    grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
    grad_A, grad_B, grad_C = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    carry = grad_final.clone()
    scale = 2 if A.is_complex() else 1  # the readout adds the conjugate half
    for at, chunk in _chunks(u, dt, A, B, C, start, backwards=True):
        before = beginnings[at.start // CHUNK]
        h, decay, within, phi = chunk.states(before, discretization)
        g = scale * grad[:, at, :, None]
        # λ_t = C̄_t g_t + decay̅_{t+1} λ_{t+1}, a scan backwards in time; `carry` is what the later chunks send.
        direct = chunk.C.conj() * g
        direct[:, -1] += carry
        coefficient = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1).conj().resolve_conj()
        adjoint = odd_even(coefficient.flip(1), direct.flip(1)).flip(1)
        carry = decay[:, 0].conj() * adjoint[:, 0]

        _add(grad_C, at, g * h.conj())
        slope, phi_slope = derivatives(chunk.z, discretization, within, phi)
        if chunk.keep is not None:
            slope = slope * chunk.keep
        grad_z = adjoint * (torch.cat([before[:, None], h[:, :-1]], 1) * slope).conj()
        x = chunk.dt * chunk.u
        if phi is None or phi_slope is None:
            _add(grad_B, at, adjoint * x)
            grad_x = _real(adjoint * chunk.B.conj())
        else:
            _add(grad_B, at, adjoint * (phi * x).conj())
            grad_x = _real(adjoint * (phi * chunk.B).conj())
            grad_z = grad_z + adjoint * (phi_slope * chunk.B * x).conj()
        grad_A += (grad_z * chunk.dt).sum((0, 1))
        grad_u[:, at] = grad_x * dt[:, at]
        grad_dt[:, at] = grad_x * u[:, at] + _real(grad_z * A.conj())
    return grad_u, grad_dt, grad_A, grad_B, grad_C, carry.clone()


def _real(x: Tensor) -> Tensor:
    total = x.sum(-1)
    return total.real if total.is_complex() else total


def _add(total: Tensor, at: slice, x: Tensor) -> None:
    """Add ``[b c d n]`` to the gradient of coefficients ``[b t n]`` or ``[d n]``."""
    if total.ndim == 3:
        total[:, at] += x.sum(2)
    else:
        total += x.sum((0, 1))
