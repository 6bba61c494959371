"""When steps happen, where sequences begin, and which steps count."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._shapes import Bool, Int, Shaped, Tensor


class Timeline(NamedTuple):
    """What is known of the steps of a batch beside their content.

    Attributes:
        dt: Time elapsed before each step, in units of the nominal step (1 everywhere when absent). Mixers with
            continuous time scale their Δ by it; others raise ``ValueError``.
        start: True where a new sequence begins: nothing before that step leaks past it, whether or not the step is
            valid.
        valid: False where a step does not count: states pass it unchanged (``dt`` there is ignored), windows skip it,
            and the output there is zero.

    Each is ``[b t]`` or broadcastable to it.
    """

    dt: Tensor | None = None
    start: Tensor | None = None
    valid: Tensor | None = None

    def slice(self, begin: int, end: int) -> Timeline:
        """Return the timeline of steps ``begin`` to ``end`` (exclusive)."""
        return Timeline(*(x if x is None or x.ndim == 0 or x.shape[-1] == 1 else x[..., begin:end] for x in self))

    def expand(self, batch: int, length: int) -> Timeline:
        """Return the timeline with every entry checked and expanded to ``[b t]``.

        Raises:
            ValueError: If an entry cannot be broadcast to ``[batch, length]``, or has the wrong kind of number.
        """
        return Timeline(*(_expanded(name, x, batch, length) for name, x in zip(self._fields, self, strict=True)))


def _expanded(name: str, x: Tensor | None, batch: int, length: int) -> Tensor | None:
    if x is None:
        return None
    if name == "dt":
        if not x.is_floating_point():
            raise ValueError(f"Timeline(dt=…): a tensor of {x.dtype} came; dt is elapsed time. Pass dt.float().")
    elif x.dtype is not torch.bool:
        raise ValueError(f"Timeline({name}=…): a tensor of {x.dtype} came; {name} is boolean. Pass {name}.bool().")
    if x.ndim > 2 or any(have not in (1, want) for have, want in zip(x.shape[::-1], (length, batch), strict=False)):
        raise ValueError(
            f"Timeline({name}=…): shape {list(x.shape)} does not broadcast to [b t] = [{batch}, {length}]. "
            f"Give one entry for each step of the input that goes with it."
        )
    return x.expand(batch, length)


def segments(start: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number the sequences of each row: 0 before the first start, one more from each start on."""
    return start.cumsum(1)


def zero_where_invalid(
    x: Shaped[Tensor, "b t *rest"], valid: Bool[Tensor, "b t"] | None
) -> Shaped[Tensor, "b t *rest"]:
    """Return ``x`` with zeros at the steps that do not count, whatever stood there."""
    return x if valid is None else x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0)


class Compaction(NamedTuple):
    """A reordering that brings the valid steps of each row to its front, and back.

    Attributes:
        order: Where each step of the compacted row stands in the given one.
        rank: Where each step of the given row stands in the compacted one.
        total: How many steps of each row are valid.
    """

    order: Int[Tensor, "b t"]
    rank: Int[Tensor, "b t"]
    total: Int[Tensor, " b"]

    @classmethod
    def of(cls, valid: Bool[Tensor, "b t"]) -> Compaction:
        """Return the compaction that keeps the valid steps of each row in order."""
        count = valid.sum(1)
        rank = torch.where(valid, valid.cumsum(1) - 1, count[:, None] + (~valid).cumsum(1) - 1)
        order = torch.empty_like(rank).scatter_(
            1, rank, torch.arange(valid.shape[1], device=valid.device).expand_as(rank)
        )
        return cls(order, rank, count)

    def compact(self, x: Shaped[Tensor, "b t *rest"]) -> Shaped[Tensor, "b t *rest"]:
        """Bring the valid steps of ``x`` to the front."""
        return _take(x, self.order)

    def restore(self, x: Shaped[Tensor, "b t *rest"]) -> Shaped[Tensor, "b t *rest"]:
        """Undo ``compact``, with zeros where steps are not valid."""
        return zero_where_invalid(_take(x, self.rank), self.rank < self.total[:, None])

    def start(self, start: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Bring start flags along: one on a step that does not count moves to the next step that does, or to the first
        of the padding, so that it still separates what comes after from what came before."""
        given = segments(start)
        inside = torch.arange(given.shape[1], device=given.device) < self.total[:, None]
        segment = torch.where(inside, _take(given, self.order), given[:, -1:])
        return torch.diff(segment, dim=1, prepend=torch.zeros_like(segment[:, :1])) > 0


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand(*index.shape, *x.shape[2:]))
