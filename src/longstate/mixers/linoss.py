"""LinOSS: forced harmonic oscillators that all channels share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import block_scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import OutputGate, check_steps, conjugate, log_uniform_


class LinOSSState(NamedTuple):
    """Velocity z and position y of every oscillator (in this order on axis 2), real and imaginary part."""

    ssm: Float[Tensor, "b n 2 2"]


class LinOSS(Mixer):
    """Run undamped oscillators, driven by all channels and read by all.

        y″(t) = −A ∘ y(t) + B u(t),    out(t) = Re(C y(t)) + D ∘ u(t),    A ≥ 0

    as a system of first order with velocity z = y′, by one of two rules (S = 1/(1 + Δ²A)):

        im      implicit, dissipative               M = [[S, −ΔAS], [ΔS, S]],      input Δ S (1, Δ) B u
        imex    implicit–explicit, keeps volume     M = [[1, −ΔA], [Δ, 1 − Δ²A]],  input Δ (1, Δ) B u

    The 2×2 matrices are scanned as they are: at A = 0 they have no two eigenvectors, and near it none to compute with.

    Args:
        d_model: Channels: inputs and outputs of the system.
        d_state: Oscillators.
        rule: "im", stable for any Δ, or "imex", stable (and without loss) where Δ²A < 4, elapsed time included.
        nonnegative: How A ≥ 0 comes from its parameter: "relu" or "exp".
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly. (The paper's Δ is a sigmoid, never over 1.)
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option is none of those, or there is no oscillator.

    Source:
        Rusch and Rus, arXiv:2410.03943.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        rule: Literal["im", "imex"] = "im",
        nonnegative: Literal["relu", "exp"] = "relu",
        dt_min: float = 1e-2,
        dt_max: float = 1.0,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("LinOSS", "rule", rule, ("im", "imex"))
        check_choice("LinOSS", "nonnegative", nonnegative, ("relu", "exp"))
        check_choice("LinOSS", "output", output, ("glu", "identity"))
        if d_state < 1:
            raise ValueError(f"LinOSS(d_state={d_state}): there is at least one oscillator. Try d_state=64.")
        check_steps("LinOSS", dt_min, dt_max)
        self.d_model, self.d_state = d_model, d_state
        self.rule, self.nonnegative, self.dt_min, self.dt_max = rule, nonnegative, dt_min, dt_max
        self.A = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        self.B = mark(nn.Parameter(torch.empty(d_state, d_model, 2)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(d_model, d_state, 2)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.log_dt = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A uniformly from (0, 1], Δ log-uniformly, B and C uniformly within ±1/√(entries added), and D."""
        if self.C.is_meta:
            return
        with torch.no_grad():
            A = 1 - torch.rand(self.d_state, dtype=torch.float64)  # never 0, where relu would stay
            self.A.copy_(A.log() if self.nonnegative == "exp" else A)
            nn.init.uniform_(self.B, -(self.d_model**-0.5), self.d_model**-0.5)
            nn.init.uniform_(self.C, -(self.d_state**-0.5), self.d_state**-0.5)
            nn.init.normal_(self.D)
            log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> LinOSSState:
        """Return zeros."""
        return LinOSSState(self.C.new_zeros(batch_size, self.d_state, 2, 2, dtype=state_dtype(self.C)))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LinOSSState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LinOSSState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        dtype = state_dtype(self.C)
        u = x.to(dtype)
        dt = self.log_dt.to(dtype).exp()
        if timeline.dt is not None:
            dt = dt * timeline.dt.to(dtype)[..., None]
        M, gain = self._transition(dt)
        # Complex matrices as pairs of real ones: one real product each way.
        driven = (u @ self.B.to(dtype).transpose(0, 1).flatten(1)).unflatten(-1, (-1, 2))
        h, final = block_scan(
            M,
            gain[..., None] * driven[..., None, :],
            None if state is None else state.ssm,
            start=timeline.start,
            valid=timeline.valid,
        )
        y = h[..., 1, :].flatten(-2) @ conjugate(self.C.to(dtype)).flatten(1).mT
        y = (y + self.D * u).to(x.dtype)
        return zero_where_invalid(self.output(y), timeline.valid), LinOSSState(final)

    def _transition(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrix of each step ``[… n 2 2]`` and what it multiplies B u by ``[… n 2]``."""
        A = self.A.to(dt.dtype)
        A = A.exp() if self.nonnegative == "exp" else A.relu()
        one, force = torch.ones_like(dt), dt * A
        gain = torch.stack([dt, dt * dt], -1)
        if self.rule == "im":
            shrink = 1 / (1 + dt * force)
            M = torch.stack([one, -force, dt, one], -1).unflatten(-1, (2, 2))
            return shrink[..., None, None] * M, shrink[..., None] * gain
        return torch.stack([one, -force, dt, 1 - dt * force], -1).unflatten(-1, (2, 2)), gain
