"""Gated linear attention in chunks: matrix products within and between them.

Within a chunk, with G the running sum of the log decays there, y_t = Σ_{s≤t} (q_t · e^{G_t − G_s} k_s) v_s + (q_t e^{G_t}) S, where S is
the state before the chunk; the state after it is e^{G_c} S + Σ_s (e^{G_c − G_s} k_s) v_sᵀ. Exponents are never positive:
e^{G_t} and e^{−G_s} are not formed apart. Document starts are masks on (t, s), not infinities in G.

A long sequence is taken in spans of chunks, so that what exists besides inputs and outputs does not grow with t; the
backward pass keeps the state before each span and recomputes the rest. Gradients come from the same two formulas; that
of G_t is q_t · ∂q_t − k_t · ∂k_t, chunk by chunk, so that nothing cancels over more than a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..._shapes import Tensor
from ..scan.chunked import scan
from .reference import linear_attention as one_step

CHUNK = 64  # steps of a chunk
SUB = 16  # steps of a sub-block, where decays differ between key channels
SPAN = 512  # steps of a span: long enough to be worth its calls, short enough for a cache


class _Span(NamedTuple):
    """Some chunks of every sequence: ``[b j h c …]``, in the heads of v."""

    q: Tensor
    k: Tensor
    v: Tensor
    G: Tensor | None  # running sum of log decays [b j h c] or [b j h c k], in float64
    same: Tensor  # [b j 1 c c] or [c c]: s ≤ t, and of one sequence
    fresh: Tensor | None  # [b j 1 c]: a sequence began in this chunk at this step or before it
    last: Tensor | None  # [b j 1 c]: of the sequence that is alive at the chunk's end

    @property
    def per_channel(self) -> bool:
        return self.G is not None and self.G.ndim == 5

    def reach(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what is left of the state before at each step, of each step at the end, and of the state before at the
        end, as factors of key channels; ``None`` stands for 1."""
        into = out = through = None
        if self.G is not None:
            G = self.G if self.per_channel else self.G[..., None]
            into, out, through = ((x.to(self.q.dtype)).exp() for x in (G, G[..., -1:, :] - G, G[..., -1, :]))
        if self.fresh is not None and self.last is not None:
            alive, kept = (~self.fresh)[..., None].to(self.q.dtype), self.last[..., None].to(self.q.dtype)
            into = alive if into is None else into * alive
            out = kept if out is None else out * kept
            through = alive[..., -1, :] if through is None else through * alive[..., -1, :]
        return into, out, through

    def decay(self) -> Tensor:
        """Return e^{G_t − G_s} for s ≤ t of one sequence and 0 elsewhere, ``[b j h c c]`` (one decay for all channels)."""
        if self.G is None:
            return self.same.to(self.q.dtype)
        # Differences in float64: sums of large decays must not swallow the small ones between neighbours.
        difference = (self.G[..., :, None] - self.G[..., None, :]).to(self.q.dtype)
        return difference.masked_fill_(~self.same, -torch.inf).exp_()


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _spans(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor | None, backwards: bool = False
) -> Iterator[tuple[slice, _Span]]:
    """Cut a sequence into spans; the last one is filled up with steps that change nothing."""
    batch, length, heads, _ = v.shape
    c = min(CHUNK, length)
    beginnings = range(0, length, SPAN)
    causal = torch.ones(c, c, dtype=torch.bool, device=v.device).tril()
    for i in reversed(beginnings) if backwards else beginnings:
        at = slice(i, min(i + SPAN, length))
        fill = -(at.stop - at.start) % c
        qs, ks, vs = (_cut(x[:, at], c, fill, heads) for x in (q, k, v))
        G = None
        if log_decay is not None:
            g = log_decay[:, at] if log_decay.ndim > 1 else log_decay.expand(batch, at.stop - at.start, heads)
            g = g[..., None] if g.ndim == 3 else g
            G = _cut(g.double(), c, fill, heads).cumsum(-2)
            G = G.squeeze(-1) if log_decay.ndim < 4 else G
        same, fresh, last = causal, None, None
        if start is not None:
            # Filled-up steps belong to the last sequence: they hold nothing, and must not cut it off.
            segment = pad(start[:, at], (0, fill)).view(batch, -1, 1, c).cumsum(-1)
            same = causal & (segment[..., :, None] == segment[..., None, :])
            fresh, last = segment > 0, segment == segment[..., -1:]
        yield at, _Span(qs, ks, vs, G, same, fresh, last)


def _cut(x: Tensor, c: int, fill: int, heads: int) -> Tensor:
    """Return ``[b t g k]`` as chunks in the heads of v, ``[b j h c k]``."""
    x = pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, c)).transpose(2, 3)
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _join(x: Tensor, length: int, groups: int) -> Tensor:
    """Undo ``_cut``, adding up heads of a group."""
    x = x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)
    return x.transpose(2, 3).flatten(1, 2)[:, :length]


def _states(span: _Span, before: Tensor, out: Tensor | None, through: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk of a span ``[b j h k p]``, and the one after the last."""
    written = _times(span.k, out).mT @ span.v
    states, after = scan(_kept(written, through), written, before)
    return torch.cat([before[:, None], states[:, :-1]], 1), after


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t h p]``, the final state ``[b h k p]``, and the state before each span ``[i b h k p]``."""
    if v.shape[1] == 1:
        return *one_step(q, k, v, log_decay, initial, start), initial[None].clone()
    y, state, beginnings = torch.empty_like(v), initial, []
    for at, span in _spans(q, k, v, log_decay, start):
        beginnings.append(state)
        into, out, through = span.reach()
        before, state = _states(span, state, out, through)
        scores = _channel_scores(span) if span.per_channel else (span.q @ span.k.mT) * span.decay()
        inside = scores @ span.v
        inside += _times(span.q, into) @ before
        y[:, at] = _join(inside, at.stop - at.start, v.shape[2])
    return y, state.clone(), torch.stack(beginnings) if beginnings else initial.new_zeros(0, *initial.shape)


def linear_attention_backward(
    grad: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    start: Tensor | None,
    beginnings: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay (empty if there is none) and the initial state."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_g = q.new_empty(0) if log_decay is None else q.new_zeros(log_decay.shape)
    after = grad_final
    heads, groups = v.shape[2], q.shape[2]
    for at, span in _spans(q, k, v, log_decay, start, backwards=True):
        length = at.stop - at.start
        gy = _cut(grad[:, at], span.v.shape[3], -length % span.v.shape[3], heads)
        into, out, through = span.reach()
        before, _ = _states(span, beginnings[at.start // SPAN], out, through)
        # The gradient of the state after each chunk is the same recurrence backwards: it reads with q what k wrote.
        read = _times(span.q, into).mT @ gy
        later, earlier = _adjoint_states(read, through, after)

        d_scores = gy @ span.v.mT
        if span.per_channel:
            scores, (dq, dk) = _channel_scores(span), _channel_scores_backward(span, d_scores)
        else:
            decay = span.decay()
            scores = (span.q @ span.k.mT) * decay
            d_scores *= decay
            dq, dk = d_scores @ span.k, d_scores.mT @ span.q
        dv = scores.mT @ gy
        dv += _times(span.k, out) @ later
        dq += _times(gy @ before.mT, into)
        dk_out = _times(span.v @ later.mT, out)
        dk += dk_out
        grad_v[:, at] = _join(dv, length, heads)
        grad_q[:, at], grad_k[:, at] = _join(dq, length, groups), _join(dk, length, groups)
        if log_decay is not None:
            dG = span.q * dq - span.k * dk
            dG[..., -1, :] += (span.k * dk_out).sum(-2) + (_kept(before, through) * before * later).sum(-1)
            # G sums the log decays up to a step: each of them is in all later sums of its chunk.
            dg = dG.flip(-2).cumsum(-2).flip(-2)
            dg = _join(dg if span.per_channel else dg.sum(-1, keepdim=True), length, heads)
            if log_decay.ndim == 1:
                grad_g += dg.sum((0, 1, 3))
            else:
                grad_g[:, at] = dg if span.per_channel else dg.squeeze(-1)
        after = earlier
    return grad_q, grad_k, grad_v, grad_g, after.clone()


def _adjoint_states(read: Tensor, through: Tensor | None, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the state after each chunk, and that of the state before the first."""
    states, first = scan(_kept(read, through).flip(1), read.flip(1), after)
    return torch.cat([after[:, None], states[:, :-1]], 1).flip(1), first


def _kept(written: Tensor, through: Tensor | None) -> Tensor:
    """Return the coefficients of the scan over chunks: a column for each ``[k p]``."""
    return torch.ones_like(written[..., :1, :1]) if through is None else through[..., None]


def _channel_scores(span: _Span) -> Tensor:
    """Return Σ_k q_tk e^{G_tk − G_sk} k_sk for s ≤ t of one sequence, ``[b j h c c]``.

    Between sub-blocks the exponent is split at the later one's beginning, so that both factors are at most 1; within a
    sub-block it is formed for each channel.
    """
    c = span.q.shape[-2]
    scores = torch.zeros(*span.q.shape[:-1], c, dtype=span.q.dtype, device=span.q.device)
    for i in range(0, c, SUB):
        here = slice(i, min(i + SUB, c))
        fine = _fine_decay(span, here)
        scores[..., here, here] = torch.einsum("...tk,...tsk,...sk->...ts", span.q[..., here, :], fine, span.k[..., here, :])
        if i > 0:
            q, k = _split(span, i, here)
            scores[..., here, :i] = (span.q[..., here, :] * q) @ (span.k[..., :i, :] * k).mT
    return scores * span.same


def _channel_scores_backward(span: _Span, d_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k through the scores."""
    c = span.q.shape[-2]
    d_scores = d_scores * span.same
    dq, dk = torch.zeros_like(span.q), torch.zeros_like(span.k)
    for i in range(0, c, SUB):
        here = slice(i, min(i + SUB, c))
        weighted = _fine_decay(span, here) * d_scores[..., here, here, None]
        dq[..., here, :] += torch.einsum("...tsk,...sk->...tk", weighted, span.k[..., here, :])
        dk[..., here, :] += torch.einsum("...tsk,...tk->...sk", weighted, span.q[..., here, :])
        if i > 0:
            q, k = _split(span, i, here)
            dq[..., here, :] += q * (d_scores[..., here, :i] @ (span.k[..., :i, :] * k))
            dk[..., :i, :] += k * (d_scores[..., here, :i].mT @ (span.q[..., here, :] * q))
    return dq, dk


def _fine_decay(span: _Span, here: slice) -> Tensor:
    """Return e^{G_t − G_s} for each channel within a sub-block, ``[… t s k]``; later s, which do not count, become 1."""
    G = span.G[..., here, :]  # type: ignore[index]
    return (G[..., :, None, :] - G[..., None, :, :]).to(span.q.dtype).clamp_(max=0).exp_()


def _split(span: _Span, i: int, here: slice) -> tuple[Tensor, Tensor]:
    """Return e^{G_t − G_r} for the sub-block and e^{G_r − G_s} for all steps before it, r the last of those."""
    G, r = span.G, slice(i - 1, i)
    return tuple(  # type: ignore[return-value]
        x.to(span.q.dtype).exp() for x in (G[..., here, :] - G[..., r, :], G[..., r, :] - G[..., :i, :])  # type: ignore[index]
    )
