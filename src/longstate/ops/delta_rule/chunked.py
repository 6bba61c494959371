"""The delta rule in chunks: a triangular system for each chunk, and matrix products.

What a step writes is u_t = β_t (v_t − (e^{g_t} S_{t−1})ᵀ k_t), in which the steps before it in its chunk stand with
what they wrote: with S the state before the chunk, and the decays of ``linear_attention.chunked``,

    (I + B) U = diag(β) (V − K_into S),    B_ts = β_t k_t · e^{G_t − G_s} k_s for s < t,    K_into = e^{G_t} k_t.

The rest is linear attention with U for V. Both right-hand sides are solved for together (Yang et al.,
arXiv:2406.06484), so that only two small products for each chunk wait for the chunk before. Exponents are never
positive. The backward pass keeps the state before each span, recomputes the rest, and solves the transposed system.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._shapes import Tensor
from ..linear_attention import _by_channel
from ..linear_attention._span import SPAN as SPAN
from ..linear_attention._span import Span, cut, spans
from . import reference


class _Parts(NamedTuple):
    """A span with heads before steps, and what it writes.

    Attributes:
        x: Queries, keys, values and decays ``[b j h c …]``.
        beta: Write strengths ``[b j h c 1]``.
        scores: What each step reads of those up to it, ``[b j h c c]``.
        own: The same of keys, of steps before it.
        q_into: Queries times what is left of the state before the chunk.
        k_into: The same of keys.
        k_out: Keys times what is left of them at the chunk's end.
    """

    x: _by_channel._Heads
    beta: Tensor
    scores: Tensor
    own: Tensor
    q_into: Tensor
    k_into: Tensor
    k_out: Tensor

    @classmethod
    def of(cls, span: Span, beta: Tensor) -> _Parts:
        x = _by_channel._Heads.of(span)
        beta = cut(beta, span.v.shape[2]).transpose(2, 3)[..., None]
        own = _scores(x._replace(q=x.k)).tril(-1)
        return cls(x, beta, _scores(x), own, x.q * x.into, x.k * x.into, x.k * x.out)

    def solve(self, *sides: Tensor, transposed: bool = False) -> tuple[Tensor, ...]:
        """Return (I + B)⁻¹, or its transpose's, times each of the right-hand sides."""
        system = self.beta * self.own
        together = torch.linalg.solve_triangular(
            system.mT if transposed else system, torch.cat(sides, -1), upper=transposed, unitriangular=True
        )
        return together.split([side.shape[-1] for side in sides], -1)

    def written(self, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is written ``[b j h c p]``, the state before each chunk and the one after the span."""
        free, erasing = self.solve(self.beta * self.x.v, self.beta * self.k_into)
        written, states, state = [], [], before
        for j in range(free.shape[1]):
            states.append(state)
            written.append(free[:, j] - erasing[:, j] @ state)
            state = self.x.through[:, j] * state + self.k_out[:, j].mT @ written[j]
        return torch.stack(written, 1), torch.stack(states, 1), state


def _scores(x: _by_channel._Heads) -> Tensor:
    return _by_channel._scores(x) if x.G.shape[-1] > 1 else (x.q @ x.k.mT) * _decay(x)


def _scores_backward(x: _by_channel._Heads, grad: Tensor) -> tuple[Tensor, Tensor]:
    if x.G.shape[-1] > 1:
        return _by_channel._scores_backward(x, grad)
    grad = grad * _decay(x)
    return grad @ x.k, grad.mT @ x.q


def _decay(x: _by_channel._Heads) -> Tensor:
    """Return e^{G_t − G_s} of a head for s ≤ t of one sequence and 0 elsewhere."""
    return (x.G - x.G.mT).to(x.q.dtype).clamp_(max=0).exp_() * x.same


def _by_step(beta: Tensor, log_decay: Tensor | None) -> Tensor:
    """Return log decays as ``[b t h k]``, or ``[b t h 1]`` where key channels share theirs."""
    if log_decay is None:
        return torch.zeros_like(beta)[..., None]
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial: Tensor,
    start: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t h p]``, the final state ``[b h k p]``, and the states around spans ``[i+1 b h k p]``.

    The last are for the backward pass: none are returned unless asked to ``keep`` them.
    """
    if v.shape[1] == 1:  # decoding is made of these: no calls but those of the recurrence
        y, state = reference.delta_rule(q, k, v, beta, log_decay, initial, start)
        return y, state, torch.stack([initial, state]) if keep else initial.new_empty(0)
    y, state, kept = torch.empty_like(v), initial, [initial]
    for at, span in spans(q, k, v, _by_step(beta, log_decay), start):
        parts = _Parts.of(span, beta[:, at])
        written, states, state = parts.written(state)
        y[:, at] = _steps(parts.scores @ written + parts.q_into @ states, at)
        if keep:
            kept.append(state)
    return y, state.clone(), torch.stack(kept) if keep else initial.new_empty(0)


def _steps(x: Tensor, at: slice) -> Tensor:
    """Return ``[b j h c …]`` as steps ``[b t h …]``, without those that filled up the last chunk."""
    return x.transpose(2, 3).flatten(1, 2)[:, : at.stop - at.start]


def delta_rule_backward(
    grad: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    start: Tensor | None,
    beginnings: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta, log_decay (empty if there is none) and the initial state."""
    grad_q, grad_k, grad_v, grad_beta = (torch.empty_like(x) for x in (q, k, v, beta))
    grad_g = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    after, groups = grad_final, q.shape[2]
    for at, span in spans(q, k, v, _by_step(beta, log_decay), start, backwards=True):
        parts, before = _Parts.of(span, beta[:, at]), beginnings[at.start // SPAN]
        here = cut(grad[:, at], span.v.shape[2]).transpose(2, 3)
        dq, dk, dv, dbeta, dG, after = _span_backward(parts, before, here, after)
        dq, dk = (_steps(d, at).unflatten(2, (groups, -1)).sum(3) for d in (dq, dk))
        grad_q[:, at], grad_k[:, at], grad_v[:, at], grad_beta[:, at] = dq, dk, _steps(dv, at), _steps(dbeta, at)
        if log_decay is not None:
            # G sums the log decays up to a step: each of them is in all later sums of its chunk.
            dg = _steps(dG.flip(3).cumsum(3).flip(3), at)
            grad_g[:, at] = dg if log_decay.ndim == 4 else dg.sum(-1)
    return grad_q, grad_k, grad_v, grad_beta, grad_g, after.clone()


def _span_backward(
    parts: _Parts, before: Tensor, grad: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta, G (like k) and the state before the span."""
    x, _, _, own, q_into, k_into, k_out = parts
    written, states, _ = parts.written(before)
    # Of the right-hand sides: a part that is known, and one that meets the gradient of the state after the chunk.
    free, waiting = parts.solve(parts.scores.mT @ grad, k_out, transposed=True)
    laters, sides = [after], []
    for j in range(free.shape[1] - 1, -1, -1):
        sides.append(free[:, j] + waiting[:, j] @ laters[-1])
        erased = k_into[:, j].mT @ (parts.beta[:, j] * sides[-1])
        laters.append(x.through[:, j] * laters[-1] + q_into[:, j].mT @ grad[:, j] - erased)
    first, later, side = laters[-1], torch.stack(laters[-2::-1], 1), torch.stack(sides[::-1], 1)
    dv = parts.beta * side
    dbeta = (side * (x.v - k_into @ states - own @ written)).sum(-1)
    dq, source = _scores_backward(x, grad @ written.mT)
    reader, of_own = _scores_backward(x._replace(q=x.k), -(dv @ written.mT).tril(-1))
    dq = dq + (grad @ states.mT) * x.into
    reader = reader - (dv @ states.mT) * x.into
    dk_out = (written @ later.mT) * x.out
    source = source + of_own + dk_out
    dG = x.q * dq + x.k * (reader - source)
    dG[..., -1, :] += (x.k * dk_out).sum(-2) + (x.through * states * later).sum(-1)
    return dq, reader + source, dv, dbeta, dG, first
