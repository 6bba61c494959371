"""Gated linear attention in chunks: matrix products within and between them.

Within a chunk, with G the running sum of the log decays there, y_t = Σ_{s≤t} (q_t · e^{G_t − G_s} k_s) v_s + (q_t
e^{G_t}) S, where S is the state before the chunk; the state after it is e^{G_c} S + Σ_s (e^{G_c − G_s} k_s) v_sᵀ.
Exponents are never positive: e^{G_t} and e^{−G_s} are not formed apart. Document starts are masks on (t, s), not
infinities in G.

A long sequence is taken in spans of chunks, so that what exists besides inputs and outputs does not grow with t; the
backward pass keeps the state before each span and recomputes the rest. Gradients come from the same two formulas, those
of G chunk by chunk, so that nothing cancels over more than a chunk.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ..._shapes import Tensor
from . import _by_channel, _by_head
from ._span import SPAN as SPAN
from ._span import cut, spans


def _form(log_decay: Tensor | None) -> ModuleType:
    return _by_channel if log_decay is not None and log_decay.ndim == 4 else _by_head


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor, start: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t h p]``, the final state ``[b h k p]``, and the states around spans ``[i+1 b h k p]``.

    The last are for the backward pass: none are returned unless asked to ``keep`` them.
    """
    if v.shape[1] == 1:
        y, state = _one_step(q, k, v, log_decay, initial, start)
        return y, state, torch.stack([initial, state]) if keep else initial.new_empty(0)
    form = _form(log_decay)
    y, state, kept = torch.empty_like(v), initial, [initial]
    for at, span in spans(q, k, v, log_decay, start):
        inside, state = form.forward(span, form.enter(state, q.shape[2]))
        y[:, at] = inside.flatten(1, 2)[:, : at.stop - at.start].flatten(2, 3)
        state = form.leave(state)
        if keep:
            kept.append(state)
    return y, state.clone(), torch.stack(kept) if keep else initial.new_empty(0)


def _one_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output ``[b 1 h p]`` and the next state, with as few calls as will do: decoding is made of them."""
    if start is not None:
        state = state.masked_fill(start[:, :, None, None], 0)
    if log_decay is not None:
        g = log_decay.exp() if log_decay.ndim == 1 else log_decay[:, 0].exp()
        state = state * (g[..., None, None] if log_decay.ndim < 4 else g[..., None])
    groups = state.unflatten(1, (q.shape[2], -1))  # [b g r k p]
    state = torch.addcmul(groups, k[:, 0, :, None, :, None], v[:, 0].unflatten(1, (q.shape[2], -1))[..., None, :])
    y = q[:, 0, :, None, None] @ state
    return y.view(*v.shape), state.flatten(1, 2)


def linear_attention_backward(
    grad: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    start: Tensor | None,
    y: Tensor,
    beginnings: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay (empty if there is none) and the initial state."""
    form, groups = _form(log_decay), q.shape[2]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_g = q.new_empty(0) if log_decay is None else log_decay.new_zeros(log_decay.shape)
    after = grad_final
    for at, span in spans(q, k, v, log_decay, start, backwards=True):
        before = form.enter(beginnings[at.start // SPAN], groups)
        y_here, grad_here = (cut(x[:, at], span.v.shape[2]).unflatten(3, (groups, -1)) for x in (y, grad))
        dq, dk, dv, dG, first = form.backward(span, before, y_here, grad_here, form.enter(after, groups))
        after = form.leave(first)
        length = at.stop - at.start
        grad_q[:, at], grad_k[:, at] = (d.flatten(1, 2)[:, :length] for d in (dq, dk))
        grad_v[:, at] = dv.flatten(1, 2)[:, :length].flatten(2, 3)
        if log_decay is not None:
            # G sums the log decays up to a step: each of them is in all later sums of its chunk.
            dg = dG.flip(2).cumsum(2).flip(2).flatten(1, 2)[:, :length].flatten(2, 3)
            if log_decay.ndim == 1:
                grad_g += dg.sum((0, 1))
            else:
                grad_g[:, at] = dg
    return grad_q, grad_k, grad_v, grad_g, after.clone()
