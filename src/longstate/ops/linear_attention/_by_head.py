"""One decay for all key channels of a head, or none: everything but the scores' decay is shared by the heads of a
group.

The state is kept as ``[b g k r p]``, so that all heads of a group meet their keys and queries in one matrix product.
"""

from __future__ import annotations

import math

import torch

from ..._shapes import Tensor
from ._span import Span, times


def enter(state: Tensor, groups: int) -> Tensor:
    """Return ``[b h k p]`` as ``[b g k r p]``."""
    return state.unflatten(1, (groups, -1)).transpose(2, 3)


def leave(state: Tensor) -> Tensor:
    """Return ``[b g k r p]`` as ``[b h k p]``."""
    return state.transpose(2, 3).flatten(1, 2)


def _decay(span: Span) -> Tensor:
    """Return e^{G_t − G_s} for s ≤ t of one sequence and 0 elsewhere, ``[b j g r c c]``."""
    dtype = span.q.dtype
    same = span.same.to(dtype)
    if span.G is None:
        return same
    G = span.G.movedim(2, -1)
    # Differences in float64: sums of large decays must not swallow the small ones between neighbours. What is left
    # after the floor is below 10⁻²⁶; smaller numbers would be denormal, on which processors stumble.
    floor = 0.7 * math.log(torch.finfo(dtype).tiny)
    return (G[..., :, None] - G[..., None, :]).to(dtype).clamp_(floor, 0).exp_().mul_(same)


def _flat(x: Tensor) -> Tensor:
    """Return ``[b j c g r p]`` as ``[b j g c (r p)]``."""
    return x.flatten(4).transpose(2, 3)


def _by_row(x: Tensor) -> Tensor:
    """Return ``[b j c g r p]`` as ``[b j g r c p]``."""
    return x.movedim(2, 4)


def _column(factor: Tensor | None) -> Tensor | None:
    """Return a factor of each step and head as one of all channels p of it."""
    return None if factor is None else factor[..., None]


def _coefficient(through: Tensor | None) -> Tensor | None:
    """Return ``[b j g r]`` as a coefficient of ``[b j g k r p]``."""
    return None if through is None else through[..., None, :, None]


def forward(span: Span, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs ``[b j c g r p]`` and the state after the span."""
    into, out, through = span.factors()
    heads = span.v.shape[4:]
    q, k = span.q.transpose(2, 3), span.k.transpose(2, 3)
    written = (k.mT @ _flat(times(span.v, _column(out)))).unflatten(-1, heads)
    states, after = span.states(written, _coefficient(through), before)
    scores = (q @ k.mT)[:, :, :, None] * _decay(span)
    inside = (scores @ _by_row(span.v)).movedim(4, 2)
    carried = (q @ states.flatten(-2)).transpose(2, 3).unflatten(-1, heads)
    return inside + carried if into is None else torch.addcmul(inside, carried, into[..., None]), after


def backward(
    span: Span, before: Tensor, y: Tensor, grad: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, G (like v without p) and the state before the span.

    Args:
        span: The inputs.
        before: The state before the span.
        y: The outputs ``[b j c g r p]``.
        grad: Their gradient.
        after: The gradient of the state after the span.
    """
    into, out, through = span.factors()
    heads = span.v.shape[4:]
    q, k = span.q.transpose(2, 3), span.k.transpose(2, 3)
    v_out, grad_into = _flat(times(span.v, _column(out))), _flat(times(grad, _column(into)))
    states, _ = span.states((k.mT @ v_out).unflatten(-1, heads), _coefficient(through), before)
    later, first = span.adjoint_states((q.mT @ grad_into).unflatten(-1, heads), _coefficient(through), after)

    decay = _decay(span)
    scores = (q @ k.mT)[:, :, :, None] * decay
    rows = _by_row(grad)
    dv = (scores.mT @ rows).movedim(4, 2)
    d_scores = ((rows @ _by_row(span.v).mT).mul_(decay)).sum(3)
    dq = d_scores @ k + grad_into @ states.flatten(-2).mT
    dk = d_scores.mT @ q + v_out @ later.flatten(-2).mT
    dv_out = times((k @ later.flatten(-2)).transpose(2, 3).unflatten(-1, heads), _column(out))
    dv = dv + dv_out
    # Each term of y_t carries e^{G_t}, each term that v_s enters e^{−G_s}, and the end of the chunk e^{G_c}.
    dG = (grad * y).sum(-1) - (span.v * dv).sum(-1)
    dG[:, :, -1] += (span.v * dv_out).sum((2, -1)) + times(states * later, _coefficient(through)).sum((3, 5))
    return dq.transpose(2, 3), dk.transpose(2, 3), dv, dG, first
