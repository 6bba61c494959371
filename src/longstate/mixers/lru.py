"""LRU: a diagonal complex recurrence with many inputs and outputs, written in discrete time."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Inexact, Tensor
from ..ops import scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import OutputGate, conjugate


class LRUState(NamedTuple):
    """The state of the modes that all channels share."""

    ssm: Inexact[Tensor, "b n"]


class LRU(Mixer):
    """Run one diagonal discrete linear recurrence with many inputs and many outputs.

        h_t = λ ∘ h_{t−1} + γ ∘ (B x_t),    y_t = Re(C h_t) + D ∘ x_t,    λ = exp(−e^ν + i e^θ)

    |λ| < 1 whatever ν is. γ is a parameter that starts at √(1 − |λ|²): then the states of white noise are as large as
    the noise.

    Args:
        d_model: Channels: inputs and outputs of the recurrence.
        d_state: Complex states.
        r_min: Least initial |λ|; the modes are drawn uniformly over the ring.
        r_max: Greatest initial |λ|.
        max_phase: Greatest initial phase of λ, in radians a step; π/10 for sequences of many thousand steps.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear recurrence alone).

    Raises:
        ValueError: If an option is none of those, there is no state, or the ring is not inside the unit circle; in
            ``forward``, if the timeline has ``dt``: the recurrence counts steps.

    Source:
        Orvieto et al., arXiv:2303.06349.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("LRU", "output", output, ("glu", "identity"))
        if d_state < 1:
            raise ValueError(f"LRU(d_state={d_state}): there is at least one state. Try d_state=64.")
        if not 0 <= r_min <= r_max < 1:
            raise ValueError(f"LRU(r_min={r_min}, r_max={r_max}): wanted 0 ≤ r_min ≤ r_max < 1, such as 0.9 and 0.999")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"LRU(max_phase={max_phase}): wanted an angle over 0 and up to 2π, such as 0.314")
        self.d_model, self.d_state = d_model, d_state
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.nu_log = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        self.theta_log = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        self.gamma_log = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        # Complex numbers are stored as pairs: optimisers and files know those.
        self.B = mark(nn.Parameter(torch.empty(d_state, d_model, 2)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(d_model, d_state, 2)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw λ uniformly over the ring, γ as that wants it, and B, C and D from normal distributions."""
        if self.C.is_meta:
            return
        with torch.no_grad():
            # In (0, 1], so that no logarithm is infinite.
            radius, phase = 1 - torch.rand(2, self.d_state, dtype=torch.float64)
            nu = -torch.log(radius * (self.r_max**2 - self.r_min**2) + self.r_min**2) / 2
            self.nu_log.copy_(nu.log())
            self.theta_log.copy_(torch.log(phase * self.max_phase))
            self.gamma_log.copy_(torch.log(-torch.expm1(-2 * nu)) / 2)
            nn.init.normal_(self.B, std=(2 * self.d_model) ** -0.5)
            nn.init.normal_(self.C, std=self.d_state**-0.5)
            nn.init.normal_(self.D)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> LRUState:
        """Return zeros."""
        dtype = state_dtype(self.C).to_complex()
        return LRUState(torch.zeros(batch_size, self.d_state, dtype=dtype, device=self.C.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LRUState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LRUState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        dtype = state_dtype(self.C)
        u = x.to(dtype)
        decay = torch.exp(torch.complex(-self.nu_log.to(dtype).exp(), self.theta_log.to(dtype).exp()))
        # Complex matrices as pairs of real ones: one real product each way.
        weight = self.gamma_log.to(dtype).exp()[:, None, None] * self.B.to(dtype)
        h, final = scan(
            decay,
            torch.view_as_complex((u @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (-1, 2))),
            None if state is None else state.ssm,
            start=timeline.start,
            valid=timeline.valid,
        )
        y = torch.view_as_real(h).flatten(-2) @ conjugate(self.C.to(dtype)).flatten(1).mT
        y = (y + self.D * u).to(x.dtype)
        return zero_where_invalid(self.output(y), timeline.valid), LRUState(final)
