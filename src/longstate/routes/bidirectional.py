"""Both directions: a causal mixer over the past, one over the future, and the present between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._shapes import Float, Tensor
from ..mixers import Mixer
from ..mixers._base import mark
from ..timeline import Timeline, zero_where_invalid


class Bidirectional(Mixer):
    """Read each sequence from both its ends.

        y_t = F(x)_{t−1} + G(x reversed) reversed_{t+1} + D ∘ x_t

    F and G are causal mixers, so what they know of t − 1 and of t + 1 is all of the past and all of the future: the
    matrix from inputs to outputs is quasiseparable, and every entry of it belongs to one of the three. Nothing is
    counted twice. Sequences packed into a row are reversed each by itself, padding is stepped over, and a gap in time
    stays between the steps that it lies between; the last step of a sequence, which has no gap behind it, takes the one
    before it.

    Args:
        ahead: The mixer of the past.
        back: The mixer of the future; ``ahead`` with the same parameters when absent.

    Raises:
        ValueError: If a mixer is not causal or the two differ in channels; in ``forward``, if there is a state: the
            future has none.

    Source:
        Hwang et al., arXiv:2407.09941, section 3.
    """

    causal = False

    def __init__(self, ahead: Mixer, back: Mixer | None = None) -> None:
        super().__init__()
        for mixer in (ahead, back or ahead):
            if not mixer.causal:
                name = type(mixer).__name__
                raise ValueError(f"Bidirectional({name}): it sees the future by itself. Take a causal mixer.")
        if back is not None and back.d_model != ahead.d_model:
            raise ValueError(
                f"Bidirectional: mixers of {ahead.d_model} and of {back.d_model} channels. Give both the same d_model."
            )
        self.d_model = ahead.d_model
        self.ahead, self.back = ahead, back
        self.D = mark(nn.Parameter(torch.empty(self.d_model)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the mixers' parameters anew, and let the present through as it is."""
        self.ahead.reset_parameters()
        if self.back is not None:
            self.back.reset_parameters()
        nn.init.ones_(self.D)

    def initial_state(self, batch_size: int) -> None:
        """Return None: what reads the future has no state."""

    def forward(
        self, x: Float[Tensor, "b t d"], state: Any = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], None]:
        """Return outputs, and no state."""
        if state is not None:
            raise ValueError(
                "Bidirectional: a state came, but outputs depend on steps to come, so that there is none to go on from."
                " Give whole sequences, without a state."
            )
        x, timeline = self._enter(x, timeline)
        turned = _reversed(x, timeline)
        past, _ = self.ahead(x, None, timeline)
        future, _ = (self.back or self.ahead)(x.flip(1), None, turned)
        y = _delayed(past, timeline) + _delayed(future, turned).flip(1) + self.D * x
        return zero_where_invalid(y.to(x.dtype), timeline.valid), None


def _delayed(y: Tensor, timeline: Timeline) -> Tensor:
    """Return at each step what stands at the one before it that counts, of the same sequence, or zeros."""
    previous = _previous(y, timeline)
    taken = y.gather(1, previous.clamp(min=0)[..., None].expand_as(y))
    return taken.masked_fill((previous < 0)[..., None], 0)


def _previous(x: Tensor, timeline: Timeline) -> Tensor:
    """Return which step before each ``[b t]`` is the last that counts of the same sequence, −1 where none is."""
    _, start, valid = timeline
    index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    counting = index if valid is None else torch.where(valid, index, -1).cummax(1).values
    previous = torch.cat([torch.full_like(index[:, :1], -1), counting], 1)[:, : x.shape[1]]
    if start is None:
        return previous
    begun = torch.where(start, index, 0).cummax(1).values
    return torch.where(previous >= begun, previous, -1)


def _reversed(x: Tensor, timeline: Timeline) -> Timeline:
    """Return the timeline of the row read from its end: where a sequence began, the one before it begins.

    The time elapsed before a step of the reversed row is that which lay behind the step.
    """
    dt, start, valid = timeline
    if start is not None:
        start = torch.cat([start, torch.zeros_like(start[:, :1])], 1)[:, 1:].flip(1) if x.shape[1] else start
    turned = Timeline(None, start, None if valid is None else valid.flip(1))
    if dt is None:
        return turned
    previous, dt = _previous(x, turned), dt.flip(1)
    return turned._replace(dt=torch.where(previous < 0, dt, dt.gather(1, previous.clamp(min=0))))
