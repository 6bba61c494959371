"""The compiled kernel: chunks of 16 steps whose squares and states stay in the cache."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor

TILE = 128  # steps between the states that the backward pass starts from; they take k/128 of the memory of v


def refusal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    if not native.takes(q, k, v):
        return "its kernel takes float32 and bfloat16 on the CPU"
    if any(x is not None and x.dtype is torch.float64 for x in (log_decay, initial)):
        return "its kernel keeps states and decays in float32"
    return ""


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor, start: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``chunked.linear_attention`` returns; q, k and v, and with v the outputs, may be bfloat16."""
    assert native.kernels is not None
    _alive, arguments = _given(q, k, v, log_decay, initial, start)
    y = native.empty(v.shape, v.dtype)
    final = torch.empty_like(initial, memory_format=torch.contiguous_format)
    kept = native.empty((-(-v.shape[1] // keep) + 1, *initial.shape)) if keep else initial.new_empty(0)
    native.kernels.linear_attention(*arguments, *_rows(y), final.data_ptr(), kept.data_ptr() if keep else 0)
    return y, final, kept


def linear_attention_backward(
    grad: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    start: Tensor | None,
    y: Tensor | None,
    beginnings: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay (empty if there is none) and the initial state."""
    assert native.kernels is not None
    batch, length, heads, _ = v.shape
    groups = q.shape[2]
    _alive, arguments = _given(q, k, v, log_decay, None, start)
    grad, grad_final, beginnings = _in_heads(grad), grad_final.contiguous(), beginnings.contiguous()
    pieces = -(-(heads // groups) // native.kernels.HEADS)
    grad_q, grad_k = (native.empty((pieces, *x.shape), x.dtype if pieces == 1 else torch.float32) for x in (q, k))
    grad_v, grad_initial = native.empty(v.shape, v.dtype), torch.empty(grad_final.shape)
    decay = decay_of_step = None
    if log_decay is not None:
        fixed = log_decay.ndim == 1
        decay = torch.zeros((batch, 1, heads) if fixed else log_decay.shape)
        decay_of_step = decay.expand(batch, length, heads) if fixed else decay
    native.kernels.linear_attention_backward(
        *arguments,
        *native.rows(None),
        0,
        native.address(beginnings),
        *_rows(grad),
        native.address(grad_final),
        *_rows(grad_q.flatten(0, 1)),
        *_rows(grad_k.flatten(0, 1)),
        *_rows(grad_v),
        *_rows(decay_of_step),
        native.address(grad_initial),
    )
    grad_q, grad_k = (x[0] if pieces == 1 else x.sum(0).to(like.dtype) for x, like in ((grad_q, q), (grad_k, k)))
    if decay is None:
        decay = torch.empty(0)
    elif log_decay is not None and log_decay.ndim == 1:
        decay = decay.sum((0, 1))
    return grad_q, grad_k, grad_v, decay, grad_initial


def _in_heads(x: Tensor) -> Tensor:
    """Return ``[b t h p]`` with heads side by side and the numbers of each too; a copy if they are not."""
    _, _, heads, width = x.shape
    _, _, head, number = x.stride()
    return x if (number == 1 or width == 1) and (head == width or heads == 1) else x.contiguous()


def _rows(x: Tensor | None) -> tuple[int, int, int, bool]:
    """Return how a kernel finds the rows of ``[b t …]``; those of a decay ``[h]`` are the same at every step."""
    if x is None:
        return 0, 0, 0, False
    batch, row = (0, 0) if x.ndim == 1 else x.stride()[:2]
    return x.data_ptr(), batch, row, x.dtype is torch.bfloat16


def _given(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None, start: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Return the tensors that must stay alive, and what the kernels begin with."""
    q, k, v = _in_heads(q), _in_heads(k), _in_heads(v)
    g = None if log_decay is None else log_decay.contiguous()
    initial = None if initial is None else initial.contiguous()
    start = None if start is None else start.contiguous()
    (batch, length, groups, keys), (_, _, heads, values) = q.shape, v.shape
    channels = 0 if g is None else keys if g.ndim == 4 else 1
    sizes = (batch, length, groups, heads, keys, values, channels, TILE, native.threads())
    rows = (*_rows(q), *_rows(k), *_rows(v), *_rows(g))
    return (q, k, v, g, initial, start), (*sizes, *rows, native.address(initial), native.address(start))
