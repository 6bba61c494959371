"""LSSL: a state space model with a dense matrix for each channel."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import dplr_scan, state_space
from ..systems import MEASURES
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import OutputGate, check_steps, log_uniform_


class LSSLState(NamedTuple):
    """The state of every channel."""

    ssm: Float[Tensor, "b d n"]


class LSSL(Mixer):
    """Run one linear time-invariant system with a dense matrix for each channel.

        x′(t) = A x(t) + B u(t),    y(t) = C x(t) + D u(t)

    sampled by the generalised bilinear rule with a step Δ learned for each channel,

        (I − αΔA) x_t = (I + (1−α)ΔA) x_{t−1} + ΔB u_t.

    A starts as a HiPPO measure's and is trained freely: nothing keeps it stable. Inputs with elapsed times of their own
    run one after the other, with a solution of n × n each; others in chunks, with powers of Ā.

    Args:
        d_model: Channels.
        d_state: States of a channel.
        measure: Where A and B start: a name in ``longstate.systems.MEASURES``, such as "legs", "legt" or "fout".
        shared: Whether all channels have one A, with steps of their own.
        alpha: How much of a step is taken implicitly, from ½ (the bilinear rule) to 1 (the backward Euler rule).
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option is none of those, there is no state, or the measure has none of that size.

    Source:
        Gu et al., "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
        NeurIPS 2021.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        measure: str = "legs",
        shared: bool = True,
        alpha: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("LSSL", "measure", measure, MEASURES)
        check_choice("LSSL", "output", output, ("glu", "identity"))
        if d_state < 1 or not 0.5 <= alpha <= 1:
            raise ValueError(
                f"LSSL(d_state={d_state}, alpha={alpha}): wanted at least one state, and alpha from 0.5 to 1: below"
                " ½, a fast stable mode becomes an unstable one"
            )
        check_steps("LSSL", dt_min, dt_max)
        self.d_model, self.d_state, self.measure, self.shared, self.alpha = d_model, d_state, measure, shared, alpha
        self.dt_min, self.dt_max = dt_min, dt_max
        self.A = mark(nn.Parameter(torch.empty(1 if shared else d_model, d_state, d_state)), 1e-3)
        self.B = mark(nn.Parameter(torch.empty(d_model, d_state)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(d_model, d_state)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.log_dt = mark(nn.Parameter(torch.empty(d_model)), 1e-3)
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set A and B as the measure says, and draw Δ, C and D."""
        if self.C.is_meta:
            return
        A, B = MEASURES[self.measure].system(self.d_state)
        with torch.no_grad():
            self.A.copy_(torch.from_numpy(A).expand_as(self.A))
            self.B.copy_(torch.from_numpy(B).expand_as(self.B))
            nn.init.normal_(self.C)
            nn.init.normal_(self.D)
            log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> LSSLState:
        """Return zeros."""
        return LSSLState(torch.zeros(batch_size, *self.C.shape, dtype=state_dtype(self.C), device=self.C.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LSSLState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LSSLState]:
        """Return outputs and the state after the last step."""
        dtype = state_dtype(self.C)
        dt = self.log_dt.to(dtype).exp()
        if timeline is not None and timeline.dt is not None and timeline.dt.numel() == 1 and timeline.valid is None:
            # Another sampling rate throughout is another Δ.
            dt, timeline = dt * timeline.dt.to(dtype).reshape(1), timeline._replace(dt=None)
        x, timeline = self._enter(x, timeline)
        u, before = x.to(dtype), None if state is None else state.ssm
        _, start, valid = timeline
        if timeline.dt is None:
            A, B = self.sampled(dt)
            y, final = state_space(u, A, B, self.C.to(dtype), before, start=start, valid=valid)
        else:
            steps = dt * timeline.dt.to(dtype)[..., None]
            y, final = dplr_scan(u, steps, *self._low_rank(dtype), before, alpha=self.alpha, start=start, valid=valid)
        y = self.output((y + self.D * u).to(x.dtype))
        return zero_where_invalid(y, timeline.valid), LSSLState(final)

    def _low_rank(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return Λ, P, Q, B and C: any matrix is Λ − P Q* with Λ = 0 and P = I."""
        A, B, C = self.A.to(dtype).expand(self.d_model, -1, -1), self.B.to(dtype), self.C.to(dtype)
        identity = torch.eye(self.d_state, dtype=dtype, device=A.device).expand_as(A)
        return torch.zeros_like(B), identity, -A.mT, B, C

    def sampled(self, dt: Float[Tensor, " d"]) -> tuple[Float[Tensor, "d n n"], Float[Tensor, "d n"]]:
        """Return Ā and B̄ for a step of each channel, solved in double precision."""
        A, step = self.A.double(), dt.double()[:, None, None]
        identity = torch.eye(self.d_state, dtype=A.dtype, device=A.device)
        right = torch.cat([identity + (1 - self.alpha) * step * A, step * self.B.double()[..., None]], -1)
        # Without a look at errors, for which a GPU would have to be waited for.
        solved = torch.linalg.solve_ex(identity - self.alpha * step * A, right)[0].to(dt.dtype)
        return solved[..., :-1], solved[..., -1]
