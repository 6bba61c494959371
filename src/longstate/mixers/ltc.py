"""LTC: liquid time-constant neurons, a differential equation solved from step to step."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import liquid
from ..ops.liquid.reference import loop
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import Linear, log_uniform_

FIXED, ADAPTIVE = ("euler", "midpoint", "rk4"), ("adaptive_heun", "bosh3", "dopri5", "dopri8")


class LTCState(NamedTuple):
    """The state of every neuron."""

    ssm: Float[Tensor, "b n"]


class LTC(Mixer):
    """Run neurons whose time constants depend on inputs and states.

        h′(t) = −(1/τ + f) ∘ h(t) + f ∘ A,    f = σ(W x + U h(t) + b),    y = W_o h + b_o

    Inputs are held over their steps. Each state stays between 0 and its A, whatever comes in. The equation is not
    linear: steps are taken one after the other, and a long sequence takes long.

    Args:
        d_model: Channels.
        d_state: Neurons.
        solver: "fused" (the paper's semi-implicit small steps, one op of ours) or a method of torchdiffeq's, which is
            then needed: "euler", "midpoint" and "rk4" by small steps too, "adaptive_heun", "bosh3", "dopri5" and
            "dopri8" by as many as the tolerances want, which all sequences of a batch share. Those run as a loop in
            Python that is not compiled or exported.
        steps: Small steps for each step, of the solvers that have a fixed number.
        dt: How long a nominal step lasts, in the unit of τ.
        tau_min: Smallest initial τ.
        tau_max: Largest initial τ; they are drawn log-uniformly.
        rtol: Relative tolerance of adaptive solvers.
        atol: Absolute tolerance of adaptive solvers.

    Raises:
        ValueError: If there is no such solver, or a number makes no sense.
        ModuleNotFoundError: If the solver is torchdiffeq's, and that is not installed.

    Source:
        Hasani et al., arXiv:2006.04439, equation 1 and algorithm 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        solver: Literal["fused", "euler", "midpoint", "rk4", "adaptive_heun", "bosh3", "dopri5", "dopri8"] = "fused",
        steps: int = 6,
        dt: float = 1.0,
        tau_min: float = 1.0,
        tau_max: float = 10.0,
        rtol: float = 1e-6,
        atol: float = 1e-8,
    ) -> None:
        super().__init__()
        check_choice("LTC", "solver", solver, ("fused", *FIXED, *ADAPTIVE))
        if min(d_state, steps) < 1 or min(dt, rtol, atol) <= 0 or not 0 < tau_min <= tau_max:
            raise ValueError(
                f"LTC(d_state={d_state}, steps={steps}, dt={dt}, tau_min={tau_min}, tau_max={tau_max}, rtol={rtol},"
                f" atol={atol}): wanted sizes of at least 1, numbers above 0, and tau_min ≤ tau_max"
            )
        if solver != "fused":
            import torchdiffeq

            self._odeint = torchdiffeq.odeint
        self.d_model, self.d_state, self.solver, self.steps, self.dt = d_model, d_state, solver, steps, dt
        self.tau_min, self.tau_max, self.rtol, self.atol = tau_min, tau_max, rtol, atol
        self.in_proj = Linear(d_model, d_state)  # W and b
        self.U = nn.Parameter(torch.empty(d_state, d_state))
        self.log_tau = mark(nn.Parameter(torch.empty(d_state)))
        self.A = mark(nn.Parameter(torch.empty(d_state)))
        self.out_proj = Linear(d_state, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw τ log-uniformly, A from a normal distribution, and the projections and U as linear layers are."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        nn.init.uniform_(self.U, -(self.d_state**-0.5), self.d_state**-0.5)
        log_uniform_(self.log_tau, self.tau_min, self.tau_max)
        nn.init.normal_(self.A)

    def initial_state(self, batch_size: int) -> LTCState:
        """Return zeros."""
        return LTCState(self.A.new_zeros(batch_size, self.d_state, dtype=state_dtype(self.A)))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LTCState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LTCState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        dtype = state_dtype(self.A)
        u, U, A, rate = (
            self.in_proj(x).to(dtype),
            self.U.to(dtype),
            self.A.to(dtype),
            torch.exp(-self.log_tau.to(dtype)),
        )
        lasts = torch.ones_like(u[..., 0]) if timeline.dt is None else timeline.dt.to(dtype)
        before = self.initial_state(x.shape[0]) if state is None else state
        _, start, valid = timeline
        if self.solver == "fused":
            h, final = liquid(u, U, rate, A, self.dt * lasts, before.ssm, steps=self.steps, start=start, valid=valid)
        else:

            def advance(h: Tensor, t: int) -> Tensor:
                return self._solve(h, u[:, t], U, rate, A, self.dt * lasts[:, t, None])

            h = loop(advance, before.ssm.to(dtype), start, valid, x.shape[1])
            final = h[:, -1].clone() if x.shape[1] else before.ssm.clone()
        return zero_where_invalid(self.out_proj(h.to(x.dtype)), valid), LTCState(final)

    def _solve(self, h: Tensor, u: Tensor, U: Tensor, rate: Tensor, A: Tensor, lasts: Tensor) -> Tensor:
        """Return the state after one step by torchdiffeq, in a time that runs from 0 to 1 for every sequence."""

        def slope(_: Tensor, h: Tensor) -> Tensor:
            f = torch.sigmoid(u + h @ U.mT)
            return lasts * (f * A - (rate + f) * h)

        points = self.steps + 1 if self.solver in FIXED else 2
        times = torch.linspace(0, 1, points, dtype=h.dtype, device=h.device)
        solved: Tensor = self._odeint(slope, h, times, method=self.solver, rtol=self.rtol, atol=self.atol)
        return solved[-1]
