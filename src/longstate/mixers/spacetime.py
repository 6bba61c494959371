"""SpaceTime: a companion state space model for each channel, which also runs in a closed loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import convolution, state_space
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import OutputGate


class SpaceTimeState(NamedTuple):
    """The last inputs that preprocessing sees, and the state of every channel's system."""

    window: Float[Tensor, "b window d"]
    ssm: Float[Tensor, "b d n"]


class SpaceTime(Mixer):
    """Run one companion system for each channel; forecast by feeding it what it says its next input will be.

        h_t = A h_{t−1} + B v_t,    y_t = C h_t,    A e_i = e_{i+1},    A e_{n−1} = a / ‖a‖₁
        v_t = Σ_i w_i u_{t−i}

    The norm keeps all eigenvalues within the unit circle. With a = 0, B = e_0 and C = (φ_1 … φ_n) the output is the
    prediction of an autoregressive process, y_t = Σ_i φ_i u_{t+1−i}.

    The taps w are fixed, one kind for each channel in turn: differences of some order, or what is left when the mean
    of the last m inputs is subtracted, δ_0 − 1/m.

    In a closed loop (``forecast``) u_{t+1} = K h_t with a learned K, so that without preprocessing h_{t+1} =
    (A + B K) h_t. It is trained by three errors of equal weight, those of the outputs at the horizon, of the outputs
    before, and of the inputs that the loop is closed by:

        y, state = mixer(past)
        future, inputs = mixer.forecast(state, steps)
        loss = mse(future, target) + mse(y, target_of_the_past) + mse(inputs, inputs_of_the_future)

    Args:
        d_model: Channels.
        d_state: States of a channel.
        differences: Orders of differences, from 0 (none) to 3.
        averages: Windows of moving averages, in steps, of at least 2.
        closed_loop: Whether there is a K.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option makes no sense; in ``forward``, if the timeline has ``dt``: a companion matrix counts
            steps.

    Source:
        Zhang et al., arXiv:2303.09489.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        differences: Sequence[int] = (0,),
        averages: Sequence[int] = (),
        closed_loop: bool = False,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("SpaceTime", "output", output, ("glu", "identity"))
        known = set(differences) <= {0, 1, 2, 3} and all(window > 1 for window in averages)
        if d_state < 1 or not (differences or averages) or not known:
            raise ValueError(
                f"SpaceTime(d_state={d_state}, differences={differences}, averages={averages}): wanted at least one"
                " state, and differences of orders from 0 to 3 or averages over at least 2 steps, such as (0, 1) and"
                " (4,)"
            )
        self.d_model, self.d_state, self.closed_loop = d_model, d_state, closed_loop
        kinds = [_difference(order) for order in differences] + [_residual(window) for window in averages]
        longest = max(len(kind) for kind in kinds)
        self.kinds = [kind + [0.0] * (longest - len(kind)) for kind in kinds]
        self.a = mark(nn.Parameter(torch.empty(d_model, d_state)))
        self.B = mark(nn.Parameter(torch.empty(d_model, d_state)))
        self.C = mark(nn.Parameter(torch.empty(d_model, d_state)))
        self.K = mark(nn.Parameter(torch.empty(d_model, d_state))) if closed_loop else None
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the systems, so that outputs are about as large as inputs."""
        nn.init.normal_(self.a)
        for parameter in (self.B, self.C, self.K):
            if parameter is not None:
                nn.init.normal_(parameter, std=1 / math.sqrt(self.d_state))
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def matrix(self) -> Float[Tensor, "d n n"]:
        """Return A, the same in the open and in the closed loop, in float32 at least."""
        a = self.a.to(state_dtype(self.a))
        # All zero is allowed: then the states move on, and are forgotten.
        column = a / a.abs().sum(1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
        shift = pad(torch.eye(self.d_state - 1, dtype=a.dtype, device=a.device), (0, 0, 1, 0))
        return torch.cat([shift.expand(self.d_model, -1, -1), column[..., None]], 2)

    def taps(self) -> Float[Tensor, "d k"]:
        """Return w, the newest first."""
        # Filled in where they are: to copy numbers to a GPU would make it wait, and is no part of a graph.
        number = self.a.new_empty(0, dtype=state_dtype(self.a)).new_full
        kinds = torch.stack([torch.stack([number((), x) for x in kind]) for kind in self.kinds])
        return kinds.repeat(-(-self.d_model // len(kinds)), 1)[: self.d_model]

    def initial_state(self, batch_size: int) -> SpaceTimeState:
        """Return zeros."""
        window = self.a.new_zeros(batch_size, len(self.kinds[0]) - 1, self.d_model)
        return SpaceTimeState(window, self.a.new_zeros(batch_size, *self.a.shape, dtype=state_dtype(self.a)))

    def forward(
        self, x: Float[Tensor, "b t d"], state: SpaceTimeState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], SpaceTimeState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        _, start, valid = timeline
        taps, A = self.taps(), self.matrix()
        before, past = (None, None) if state is None else (state.ssm, state.window.to(taps.dtype))
        v, window = convolution.short(x.to(taps.dtype), taps.flip(1), None, past, start=start, valid=valid)
        B, C = self.B.to(taps.dtype), self.C.to(taps.dtype)
        y, final = state_space(v, A, B, C, before, start=start, valid=valid)
        y = zero_where_invalid(self.output(y.to(x.dtype)), valid)
        return y, SpaceTimeState(window.to(x.dtype), final)

    def forecast(self, state: SpaceTimeState, steps: int) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]:
        """Return outputs and inputs of the steps to come, each input being K times the state before it.

        Args:
            state: The state after the last known step.
            steps: How many to forecast.

        Raises:
            ValueError: If the mixer has no K.
        """
        if self.K is None:
            raise ValueError("SpaceTime.forecast: the loop is not closed. Build the mixer with closed_loop=True.")
        A, taps, dtype = self.matrix(), self.taps(), state_dtype(self.a)
        B, C, K = (p.to(dtype)[..., None] for p in (self.B, self.C, self.K))
        # The last inputs, the newest first, are states beside those of the system.
        past = max(1, taps.shape[1] - 1)
        weights = pad(taps, (0, past + 1 - taps.shape[1]))[:, None]
        system = torch.cat([A + weights[..., :1] * B @ K.mT, B @ weights[..., 1:]], 2)
        shift = torch.eye(past, dtype=dtype, device=A.device)[:-1].expand(self.d_model, -1, -1)
        inputs = torch.cat([pad(K.mT, (0, past)), pad(shift, (self.d_state, 0))], 1)
        window = state.window.to(dtype).flip(1).mT
        initial = torch.cat([state.ssm, pad(window, (0, past - window.shape[2]))], 2)
        nothing = initial.new_zeros(len(initial), steps, self.d_model)
        closed, none = torch.cat([system, inputs], 1), initial.new_zeros(initial.shape[1:])
        read = torch.zeros_like(none)
        read[:, self.d_state] = 1
        y, _ = state_space(nothing, closed, none, pad(C[..., 0], (0, past)), initial)
        u, _ = state_space(nothing, closed, none, read, initial)
        return self.output(y.to(self.a.dtype)), u.to(self.a.dtype)


def _difference(order: int) -> list[float]:
    return [float((-1) ** i * math.comb(order, i)) for i in range(order + 1)]


def _residual(window: int) -> list[float]:
    return [1 - 1 / window] + [-1 / window] * (window - 1)
