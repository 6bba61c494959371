"""Two scales of time: a mixer within chunks, and one over what the chunks came to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from .._errors import check_choice
from .._shapes import Float, Int, Tensor
from ..mixers import Mixer
from ..mixers._base import state_dtype
from ..timeline import Compaction, Timeline, zero_where_invalid


class HiSSState(NamedTuple):
    """Where each sequence is in its chunk, how long that has lasted (in nominal steps), the last output of the slower
    scale, and the states of both mixers."""

    phase: Int[Tensor, " b"]
    elapsed: Float[Tensor, " b"]
    held: Float[Tensor, "b d"]
    lower: Any
    higher: Any


class HiSS(Mixer):
    """Read each chunk of a sequence from the initial state, and the chunks' last outputs at a slower rate.

        l_t = L(x)_t, L beginning anew after every c steps;    z = H(l_c, l_2c, …);    y_t = l_t + z_⌊t/c⌋

    for t = 1, 2, …, with z_0 = 0: each output of H is held until the next. The paper's network has z alone
    (``output="held"``): its outputs at the slower rate are then ``y[:, c−1::c]`` of sequences read from their
    beginnings. Steps that do not count belong to no chunk; where a sequence begins, so does a chunk, and the one before
    it stays unfinished. For H, the time before a step is what its chunk lasted, in units of c nominal steps; either
    every call that a chunk is read in has ``dt`` or none has.

    Args:
        lower: The mixer within chunks.
        higher: The mixer over chunks.
        chunk: Steps of a chunk, c.
        output: "sum" (of both scales) or "held" (the slower alone).

    Raises:
        ValueError: If a mixer is not causal or has no state, the two differ in channels, there is no such output, or a
            chunk has no step; in ``forward``, if the timeline has ``dt`` and either mixer counts steps.

    Source:
        Bhirangi et al., "Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling", ICML 2024.
    """

    def __init__(self, lower: Mixer, higher: Mixer, chunk: int, output: Literal["sum", "held"] = "sum") -> None:
        super().__init__()
        check_choice("HiSS", "output", output, ("sum", "held"))
        if chunk < 1:
            raise ValueError(f"HiSS(chunk={chunk}): a chunk has at least one step. Try chunk=10.")
        for mixer in (lower, higher):
            if not mixer.causal or mixer.initial_state(1) is None:
                name = type(mixer).__name__
                raise ValueError(f"HiSS({name}): outputs and states are handed on. Take a causal mixer with a state.")
        if lower.d_model != higher.d_model:
            raise ValueError(
                f"HiSS: mixers of {lower.d_model} and of {higher.d_model} channels. Give both the same d_model."
            )
        self.d_model, self.chunk, self.output = lower.d_model, chunk, output
        self.lower, self.higher = lower, higher

    def reset_parameters(self) -> None:
        """Draw both mixers' parameters anew."""
        self.lower.reset_parameters()
        self.higher.reset_parameters()

    def initial_state(self, batch_size: int) -> HiSSState:
        """Return the beginning of a chunk, and zeros in the place of the slower scale's last output."""
        like = next(self.parameters())
        zeros = torch.zeros(batch_size, self.d_model, dtype=state_dtype(like), device=like.device)
        lower, higher = self.lower.initial_state(batch_size), self.higher.initial_state(batch_size)
        return HiSSState(torch.zeros_like(zeros[:, 0], dtype=torch.long), zeros[:, 0].clone(), zeros, lower, higher)

    def forward(
        self, x: Float[Tensor, "b t d"], state: HiSSState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], HiSSState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        state = self.initial_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, state
        dt, start, valid = timeline
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
        start = torch.zeros_like(valid) if start is None else start
        index = torch.arange(x.shape[1], device=x.device).expand(valid.shape)
        # How many steps there were before the sequence began; less than none where it did in an earlier call.
        counted = valid.cumsum(1)
        before = torch.cat([-state.phase[:, None], counted - valid.long()], 1)
        place = counted - before.gather(1, _last(start, index))
        first, ends = valid & (place % self.chunk == 1 % self.chunk), valid & (place % self.chunk == 0)
        lasted = _lasted(valid if dt is None else dt, first, index, state.elapsed)

        low, lower = self.lower(x, state.lower, Timeline(dt, first, timeline.valid))
        per_chunk = None if dt is None else lasted / self.chunk
        high, higher = self._slowly(low, ends, Timeline(per_chunk, timeline.start, ends), state.higher)

        # The steps of z that each step can have seen, from 0 on: that before this call is in the state.
        finished = ends.cumsum(1)
        of_others = torch.cat([torch.full_like(finished[:, :1], -1), finished - ends.long()], 1)
        held = torch.cat([state.held[:, None], high.to(state.held.dtype)], 1)
        held = held.gather(1, finished[..., None].expand(*finished.shape, self.d_model))
        held = held.masked_fill((finished == of_others.gather(1, _last(start, index)))[..., None], 0)
        y = held.to(low.dtype) if self.output == "held" else low + held.to(low.dtype)
        after = HiSSState(
            place[:, -1] % self.chunk, lasted[:, -1].to(state.elapsed.dtype).clone(), held[:, -1].clone(), lower, higher
        )
        return zero_where_invalid(y, timeline.valid), after

    def _slowly(self, x: Tensor, ends: Tensor, timeline: Timeline, state: Any) -> tuple[Tensor, Any]:
        """Run the higher mixer over the steps where chunks end, and return what it makes of them one after the other,
        and its state."""
        compaction = Compaction.of(ends)
        # One more than chunks can end, for a sequence that begins after the last of them.
        # An exported graph takes any length, also one that is shorter than that.
        room = x.shape[1] if torch.compiler.is_exporting() else (x.shape[1] + self.chunk - 1) // self.chunk + 1
        dt, start, _ = timeline
        slow = Timeline(
            None if dt is None else compaction.compact(dt)[:, :room],
            None if start is None else compaction.start(start)[:, :room],
            compaction.compact(ends)[:, :room],
        )
        high, after = self.higher(compaction.compact(x)[:, :room], state, slow)
        return high, after


def _lasted(steps: Tensor, first: Tensor, index: Tensor, elapsed: Tensor) -> Tensor:
    """Return how long the chunk has lasted after each step."""
    # In double precision: sums over a long row are subtracted.
    total = steps.double().cumsum(1)
    before = torch.cat([-elapsed.double()[:, None], total - steps.double()], 1)
    return total - before.gather(1, _last(first, index))


def _last(marks: Tensor, index: Tensor) -> Tensor:
    """Return, for each step, 1 + the last step up to it that is marked, or 0."""
    return torch.where(marks, index + 1, 0).cummax(1).values
