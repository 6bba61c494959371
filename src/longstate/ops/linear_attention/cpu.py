"""The compiled kernel: chunks of 16 steps whose squares and states stay in the cache."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor

TILE = 128  # steps between the states that the backward pass starts from; they take k/128 of the memory of v


def refusal(*tensors: Tensor | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does."""
    return "" if native.takes(*tensors) else "its kernel takes float32 and bfloat16 on the CPU"


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    dt: Tensor | None,
    D: Tensor | None,
    start: Tensor | None,
    erases: bool,
    keep: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t h p]``, the final state ``[b h k p]`` and the states around tiles ``[j+1 b h k p]``.

    If it ``erases``, what the state held at each key is taken from the value before it is written: the delta rule. The
    states around tiles are for the backward pass, one every ``keep`` steps (``TILE`` here); none where it is 0.
    """
    assert native.kernels is not None and keep in (0, TILE) and not narrow
    given = _Given(q, k, v, log_decay, initial, dt, D, start, erases)
    y, final = native.empty(v.shape, v.dtype), torch.empty(given.state)
    kept = native.empty((-(-v.shape[1] // TILE) + 1, *given.state)) if keep else torch.empty(0)
    native.kernels.linear_attention(*given.numbers(), *_rows(y), final.data_ptr(), kept.data_ptr() if keep else 0)
    return y, final, kept


def linear_attention_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    dt: Tensor | None,
    D: Tensor | None,
    start: Tensor | None,
    kept: Tensor,
    erases: bool,
    keep: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, log_decay, the initial state, dt and D; empty ones where there is none."""
    assert native.kernels is not None and keep in (0, TILE)
    batch, length, heads, values = v.shape
    given = _Given(q, k, v, log_decay, None, dt, D, start, erases)
    grad, grad_final, kept = _in_heads(grad), native.side_by_side(grad_final), kept.contiguous()
    pieces = -(-(heads // q.shape[2]) // native.kernels.HEADS)
    # The sums over the heads of a group, piece by piece.
    grad_q, grad_k = (native.empty((pieces, *x.shape), x.dtype if pieces == 1 else torch.float32) for x in (q, k))
    grad_v, grad_initial = native.empty(v.shape, v.dtype), torch.empty(given.state)
    grad_dt, grad_D = (None if dt is None else native.like(dt)), torch.empty(batch, heads, values)
    decay = grad_decay = None
    if log_decay is not None:
        fixed = log_decay.ndim == 1
        grad_decay = torch.zeros((batch, 1, heads) if fixed else log_decay.shape)
        decay = grad_decay.expand(batch, length, heads) if fixed else grad_decay
    native.kernels.linear_attention_backward(
        *given.numbers(),
        *_rows(None),
        0,
        kept.data_ptr(),
        *_rows(grad),
        native.address(grad_final),
        *_rows(grad_q.flatten(0, 1)),
        *_rows(grad_k.flatten(0, 1)),
        *_rows(grad_v),
        *_rows(decay),
        *_rows(grad_dt),
        grad_D.data_ptr(),
        grad_initial.data_ptr(),
    )
    nothing = torch.empty(0)
    if grad_decay is not None and log_decay is not None:
        grad_decay = (grad_decay.sum((0, 1)) if log_decay.ndim == 1 else grad_decay).to(log_decay.dtype)
    if D is not None:
        grad_D = grad_D.sum(0 if D.ndim == 2 else (0, 2)).to(D.dtype)
    return (
        *(x[0] if pieces == 1 else x.sum(0).to(like.dtype) for x, like in ((grad_q, q), (grad_k, k))),
        grad_v,
        nothing.clone() if grad_decay is None else grad_decay,
        grad_initial,
        nothing.clone() if grad_dt is None else grad_dt,
        nothing.clone() if D is None else grad_D,
    )


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


class _Given:
    """What both kernels begin with, kept alive as long as they run."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        dt: Tensor | None,
        D: Tensor | None,
        start: Tensor | None,
        erases: bool,
    ) -> None:
        (batch, length, groups, keys), (_, _, heads, values) = q.shape, v.shape
        self.state = (batch, heads, keys, values)
        channels = 0 if log_decay is None else keys if log_decay.ndim == 4 else 1
        skips = 1 if D is None or D.ndim == 1 else values
        self.sizes = (batch, length, groups, heads, keys, values, channels, skips, erases, TILE, native.threads())
        log_decay, dt, D, start = (None if x is None else x.contiguous() for x in (log_decay, dt, D, start))
        self.rows = (_in_heads(q), _in_heads(k), _in_heads(v), log_decay, dt)
        self.D, self.initial, self.start = D, native.single(initial), start

    def numbers(self) -> tuple[int, ...]:
        q, k, v, log_decay, dt = self.rows
        rows = (*_rows(q), *_rows(k), *_rows(v), *_rows(log_decay), *_rows(dt), *native.vector(self.D))
        return *self.sizes, *rows, native.address(self.initial), native.address(self.start)
