"""S4: a state space model of a diagonal minus a low rank for each channel."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Inexact, Tensor
from ..systems import nplr
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._dplr import System, run
from ._parts import OutputGate, check_steps, log_uniform_

MEASURES = ("legs", "legt", "lagt", "fout", "mixed")
SLOWEST = 1e-4  # −Re λ where a measure has 0, of which there is no logarithm


class S4State(NamedTuple):
    """The state of every channel's modes, in the basis of their diagonal part."""

    ssm: Inexact[Tensor, "b d n"]


class S4(Mixer):
    """Run one linear time-invariant system of a diagonal minus a low rank for each channel.

        x′(t) = (diag(Λ) − P Q*) x(t) + B u(t),    y(t) = 2 Re(Cᵀ x(t)) + D u(t)

    sampled by the bilinear rule with a step Δ learned for each channel. A long plain sequence is convolved with a
    kernel made of Cauchy sums; one of several documents, or with steps that do not count, runs in chunks of a dense
    matrix; a few steps, or steps that last differently long, run by Woodbury's identity at O(n r) each. All give the
    same outputs and the same state.

    Args:
        d_model: Channels.
        d_state: Real states of a channel; of each conjugate pair of modes one is kept.
        measure: Which HiPPO measure the systems start from: "legs", "lagt" or "fout" (of rank r = 1), "legt" (of rank
            2), or "mixed" (LegS for the first half of the channels, FouT for the others).
        tied: Whether Q = P, which keeps the system stable whatever an optimiser does.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option is none of those, or ``d_state`` is odd.

    Source:
        Gu et al., arXiv:2111.00396; measures, Gu et al., How to train your HiPPO (2022); Q = P, Goel et al., It's raw!
        Audio generation with state-space models (2022).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        measure: str = "legs",
        tied: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("S4", "measure", measure, MEASURES)
        check_choice("S4", "output", output, ("glu", "identity"))
        if d_state < 2 or d_state % 2:
            raise ValueError(
                f"S4(d_state={d_state}): modes come in conjugate pairs. Try d_state={max(2, d_state + 1)}."
            )
        check_steps("S4", dt_min, dt_max)
        self.d_model, self.d_state, self.measure, self.tied = d_model, d_state, measure, tied
        self.dt_min, self.dt_max = dt_min, dt_max
        shape, rank = (d_model, d_state // 2), 2 if measure == "legt" else 1
        # Complex numbers are stored as pairs: optimisers and files know those.
        self.log_A_real = mark(nn.Parameter(torch.empty(shape)), 1e-3)
        self.A_imag = mark(nn.Parameter(torch.empty(shape)), 1e-3)
        self.P = mark(nn.Parameter(torch.empty(*shape, rank, 2)), 1e-3)
        self.Q = None if tied else mark(nn.Parameter(torch.empty(*shape, rank, 2)), 1e-3)
        self.B = mark(nn.Parameter(torch.empty(*shape, 2)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(*shape, 2)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.log_dt = mark(nn.Parameter(torch.empty(d_model)), 1e-3)
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set Λ, P, Q and B as the measure says, and draw Δ, C and D."""
        if self.C.is_meta:
            return
        first = (self.d_model + 1) // 2 if self.measure == "mixed" else self.d_model
        with torch.no_grad():
            self._start_from("legs" if self.measure == "mixed" else self.measure, slice(0, first))
            if first < self.d_model:
                self._start_from("fout", slice(first, None))
            nn.init.normal_(self.C, std=math.sqrt(0.5))
            nn.init.normal_(self.D)
            log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def _start_from(self, measure: str, channels: slice) -> None:
        modes = nplr(measure, self.d_state)
        values = [
            (self.log_A_real, np.log(np.maximum(-modes.eigenvalues.real, SLOWEST))),
            (self.A_imag, modes.eigenvalues.imag.copy()),
            (self.B, modes.B.view(np.float64).reshape(*modes.B.shape, 2)),
        ]
        P = np.ascontiguousarray(modes.P)
        values += [(x, P.view(np.float64).reshape(*P.shape, 2)) for x in (self.P, self.Q) if x is not None]
        for parameter, value in values:
            parameter[channels] = torch.from_numpy(value).to(parameter)

    def initial_state(self, batch_size: int) -> S4State:
        """Return zeros."""
        shape, dtype = (batch_size, *self.A_imag.shape), state_dtype(self.C).to_complex()
        return S4State(torch.zeros(shape, dtype=dtype, device=self.C.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: S4State | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], S4State]:
        """Return outputs and the state after the last step."""
        system = self.system()
        if timeline is not None and timeline.dt is not None and timeline.dt.numel() == 1 and timeline.valid is None:
            # Another sampling rate throughout is another Δ: still a convolution.
            scaled = system.dt * timeline.dt.to(system.dt.dtype).reshape(1)
            system, timeline = system._replace(dt=scaled), timeline._replace(dt=None)
        x, timeline = self._enter(x, timeline)
        u = x.to(system.dt.dtype)
        y, final = run(u, system, None if state is None else state.ssm, timeline)
        y = self.output((y + self.D * u).to(x.dtype))
        return zero_where_invalid(y, timeline.valid), S4State(final)

    def system(self) -> System:
        """Return the continuous systems and their steps, in float32 at least."""
        dtype = state_dtype(self.C)
        P, B, C = (torch.view_as_complex(x.to(dtype)) for x in (self.P, self.B, self.C))
        Q = P if self.Q is None else torch.view_as_complex(self.Q.to(dtype))
        poles = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return System(poles, P, Q, B, C, self.log_dt.to(dtype).exp())
