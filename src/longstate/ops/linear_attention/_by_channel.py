"""A decay for each key channel: the scores need it inside their sum over channels.

Between sub-blocks of a chunk the exponent is split at the later one's beginning, e^{G_t − G_r} e^{G_r − G_s}, so that
both factors are at most 1; within a sub-block it is formed for each channel. Groups are written out as heads here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._shapes import Tensor
from ._span import Span

SUB = 16  # steps of a sub-block


class _Heads(NamedTuple):
    """A span with heads before steps: ``[b j h c …]``, and its factors."""

    q: Tensor
    k: Tensor
    v: Tensor
    G: Tensor
    same: Tensor
    into: Tensor
    out: Tensor
    through: Tensor

    @classmethod
    def of(cls, span: Span) -> _Heads:
        into, out, through = span.factors()
        assert span.G is not None and into is not None and out is not None and through is not None
        repeats = span.v.shape[4]
        q, k = (x[:, :, :, :, None].expand(*x.shape[:4], repeats, -1) for x in (span.q, span.k))
        q, k, v, G = (x.flatten(3, 4).transpose(2, 3) for x in (q, k, span.v, span.G))
        into, out = (x.expand_as(span.G).flatten(3, 4).transpose(2, 3) for x in (into, out))
        same = span.same if span.same.ndim == 2 else span.same[:, :, 0]
        return cls(q, k, v, G, same, into, out, through.expand_as(span.G[:, :, 0]).flatten(2, 3)[..., None])


def enter(state: Tensor, groups: int) -> Tensor:
    """Return the state ``[b h k p]`` as it is."""
    return state


def leave(state: Tensor) -> Tensor:
    """Return the state ``[b h k p]`` as it is."""
    return state


def forward(span: Span, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs ``[b j c g r p]`` and the state after the span."""
    x = _Heads.of(span)
    states, after = span.states((x.k * x.out).mT @ x.v, x.through, before)
    y = _scores(x) @ x.v + (x.q * x.into) @ states
    return y.transpose(2, 3).unflatten(3, span.v.shape[3:5]), after


def backward(
    span: Span, before: Tensor, y: Tensor, grad: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, G (like the span's) and the state before the span; see ``_by_head.backward``."""
    x = _Heads.of(span)
    grad = grad.flatten(3, 4).transpose(2, 3)
    states, _ = span.states((x.k * x.out).mT @ x.v, x.through, before)
    later, first = span.adjoint_states((x.q * x.into).mT @ grad, x.through, after)
    dq, dk = _scores_backward(x, grad @ x.v.mT)
    dq += (grad @ states.mT) * x.into
    dk_out = (x.v @ later.mT) * x.out
    dk += dk_out
    dv = _scores(x).mT @ grad + (x.k * x.out) @ later
    dG = x.q * dq - x.k * dk
    dG[..., -1, :] += (x.k * dk_out).sum(-2) + (x.through * states * later).sum(-1)
    heads = span.v.shape[3:5]
    dq, dk, dv, dG = (d.transpose(2, 3).unflatten(3, heads) for d in (dq, dk, dv, dG))
    return dq.sum(4), dk.sum(4), dv, dG, first


def _scores(x: _Heads) -> Tensor:
    """Return Σ_k q_tk e^{G_tk − G_sk} k_sk for s ≤ t of one sequence, ``[b j h c c]``."""
    c = x.q.shape[-2]
    scores = torch.zeros(*x.q.shape[:-1], c, dtype=x.q.dtype, device=x.q.device)
    for i in range(0, c, SUB):
        here = slice(i, min(i + SUB, c))
        scores[..., here, here] = torch.einsum(
            "...tk,...tsk,...sk->...ts", x.q[..., here, :], _inside(x, here), x.k[..., here, :]
        )
        if i > 0:
            to, since = _between(x, here)
            scores[..., here, :i] = (x.q[..., here, :] * to) @ (x.k[..., :i, :] * since).mT
    return scores * x.same


def _scores_backward(x: _Heads, d_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k through the scores."""
    c = x.q.shape[-2]
    d_scores = d_scores * x.same
    dq, dk = torch.zeros_like(x.q), torch.zeros_like(x.k)
    for i in range(0, c, SUB):
        here = slice(i, min(i + SUB, c))
        weighted = _inside(x, here) * d_scores[..., here, here, None]
        dq[..., here, :] += torch.einsum("...tsk,...sk->...tk", weighted, x.k[..., here, :])
        dk[..., here, :] += torch.einsum("...tsk,...tk->...sk", weighted, x.q[..., here, :])
        if i > 0:
            to, since = _between(x, here)
            dq[..., here, :] += to * (d_scores[..., here, :i] @ (x.k[..., :i, :] * since))
            dk[..., :i, :] += since * (d_scores[..., here, :i].mT @ (x.q[..., here, :] * to))
    return dq, dk


def _inside(x: _Heads, here: slice) -> Tensor:
    """Return e^{G_t − G_s} for each channel within a sub-block, ``[… t s k]``; later s, which do not count, become
    1."""
    G = x.G[..., here, :]
    return (G[..., :, None, :] - G[..., None, :, :]).to(x.q.dtype).clamp_(max=0).exp_()


def _between(x: _Heads, here: slice) -> tuple[Tensor, Tensor]:
    """Return e^{G_t − G_r} for a sub-block and e^{G_r − G_s} for all steps before it, r the last of those."""
    r = x.G[..., here.start - 1 : here.start, :]
    to, since = (d.to(x.q.dtype).exp() for d in (x.G[..., here, :] - r, r - x.G[..., : here.start, :]))
    return to, since
