"""A stretch of time cut into chunks, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..._shapes import Tensor
from ..scan.chunked import scan

CHUNK = 64  # steps of a chunk
SPAN = 512  # steps of a span: long enough to be worth its calls, short enough for a cache


class Span(NamedTuple):
    """Some chunks of every sequence, axes in their natural order, heads split into g groups of r.

    Attributes:
        q: Queries ``[b j c g k]``.
        k: Keys ``[b j c g k]``.
        v: Values ``[b j c g r p]``.
        G: Running sums of the log decays in each chunk ``[b j c g r]`` or ``[b j c g r k]``, in float64.
        same: Pairs (t, s) with s ≤ t and of one sequence, ``[c c]`` or ``[b j 1 1 c c]``.
        fresh: Steps at or after the first start of their chunk, ``[b j c]``.
        last: Steps of the sequence that is alive at the chunk's end, ``[b j c]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    G: Tensor | None
    same: Tensor
    fresh: Tensor | None
    last: Tensor | None

    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what is left of the state before at each step, of each step at the chunk's end (both like G), and of
        the state before at the end (like G without c); ``None`` stands for 1."""
        into = out = through = None
        if self.G is not None:
            end = self.G[:, :, -1:]
            into, out, through = (x.to(self.q.dtype).exp() for x in (self.G, end - self.G, end.squeeze(2)))
        if self.fresh is not None and self.last is not None:
            rank = 5 if self.G is None else self.G.ndim
            alive, kept = (x.to(self.q.dtype).view(*x.shape, *[1] * (rank - 3)) for x in (~self.fresh, self.last))
            into, out, through = times(alive, into), times(kept, out), times(alive[:, :, -1], through)
        return into, out, through

    def states(self, written: Tensor, through: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state before each chunk, of what each chunk writes and the state before the span, and the one
        after."""
        kept = torch.ones_like(written[..., :1, :1, :1]) if through is None else through
        states, after = scan(kept, written, before)
        return torch.cat([before[:, None], states[:, :-1]], 1), after

    def adjoint_states(self, read: Tensor, through: Tensor | None, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the state after each chunk, and that of the state before the span.

        It is the same recurrence backwards: the gradient reads with q what the state wrote with k.
        """
        states, first = self.states(read.flip(1), None if through is None else through.flip(1), after)
        return states.flip(1), first


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply by a factor of which ``None`` stands for 1."""
    return x if factor is None else x * factor


def spans(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor | None, backwards: bool = False
) -> Iterator[tuple[slice, Span]]:
    """Cut a sequence into spans, the last of them filled up with steps that change nothing."""
    batch, length, heads, _ = v.shape
    groups, c = q.shape[2], min(CHUNK, length)
    causal = torch.ones(c, c, dtype=torch.bool, device=v.device).tril()
    beginnings = range(0, length, SPAN)
    for i in reversed(beginnings) if backwards else beginnings:
        at = slice(i, min(i + SPAN, length))
        G = None
        if log_decay is not None:
            g = log_decay[:, at] if log_decay.ndim > 1 else log_decay.expand(batch, at.stop - at.start, heads)
            G = cut(g.double(), c).unflatten(3, (groups, -1)).cumsum(2)
        same, fresh, last = causal, None, None
        if start is not None:
            # Filled-up steps belong to the last sequence: they hold nothing, and must not cut it off.
            segment = cut(start[:, at], c).cumsum(2)
            same = (causal & (segment[..., :, None] == segment[..., None, :]))[:, :, None, None]
            fresh, last = segment > 0, segment == segment[..., -1:]
        values = cut(v[:, at], c).unflatten(3, (groups, -1))
        yield at, Span(cut(q[:, at], c), cut(k[:, at], c), values, G, same, fresh, last)


def cut(x: Tensor, c: int) -> Tensor:
    """Return ``[b t …]`` as chunks ``[b j c …]``."""
    fill = -x.shape[1] % c
    x = pad(x, (*[0] * (2 * (x.ndim - 2)), 0, fill)) if fill else x
    return x.unflatten(1, (-1, c))
