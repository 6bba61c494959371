"""S4D: a diagonal state space model for each channel."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Inexact, Tensor
from ..ops import selective_scan
from ..ops.selective_scan.discretization import phi
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._diagonal import CONVOLUTION_FROM, convolve, log_bilinear
from ._modes import INITIALIZATIONS, PARAMETERIZATIONS, circle_modes, initial_modes, real_part, set_real_part_
from ._parts import OutputGate, check_steps, log_uniform_


class S4DState(NamedTuple):
    """The state of every channel's modes."""

    ssm: Inexact[Tensor, "b d n"]


class S4D(Mixer):
    """Run one diagonal linear time-invariant system for each channel.

        x′(t) = diag(A) x(t) + B u(t),    y(t) = 2 Re(Cᵀ x(t)) + D u(t)

    sampled with a step Δ learned for each channel. A long plain sequence is convolved with the kernel
    K_l = 2 Re Σ_n C_n B̄_n Ā_n^l; a short one, or one with a timeline, is scanned. Both give the same outputs and the
    same state.

    Args:
        d_model: Channels.
        d_state: Real states of a channel; of each conjugate pair of modes one is kept.
        initialization: "legs" (HiPPO-LegS' normal part), "lin" (−½ + iπn), "inv", "quad" or "real" (−(n+1)); "dfout"
            (discrete poles equally spaced on a circle, those of the channels between one another); "ptd" (HiPPO-LegS
            itself, perturbed and then diagonalised: S4-PTD).
        discretization: "zoh" or "bilinear".
        parameterization: How Re A comes from the parameter ``A_real``: "exp" (−e^w), "softplus" (−log(1 + e^w)),
            "stable" (−1/(w² + 0.1)), or "direct" (w, which nothing keeps negative). All start at the same A.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option is none of those, or ``d_state`` is odd where modes come in pairs.

    Source:
        Gu et al., arXiv:2206.11893; parameterisations of Re A, Wang and Li, arXiv:2311.14495; "ptd", Yu et al.,
        arXiv:2310.01698; "dfout", arXiv:2508.20441.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        initialization: str = "legs",
        discretization: Literal["zoh", "bilinear"] = "zoh",
        parameterization: Literal["exp", "softplus", "direct", "stable"] = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("S4D", "initialization", initialization, INITIALIZATIONS)
        check_choice("S4D", "discretization", discretization, ("zoh", "bilinear"))
        check_choice("S4D", "parameterization", parameterization, PARAMETERIZATIONS)
        check_choice("S4D", "output", output, ("glu", "identity"))
        if d_state < 1 or (d_state % 2 and initialization != "real"):
            raise ValueError(
                f"S4D(d_state={d_state}): modes come in conjugate pairs. Try d_state={max(2, d_state + 1)}."
            )
        check_steps("S4D", dt_min, dt_max)
        self.d_model, self.d_state = d_model, d_state
        self.initialization, self.discretization = initialization, discretization
        self.parameterization, self.dt_min, self.dt_max = parameterization, dt_min, dt_max
        self.real = initialization == "real"
        parts = () if self.real else (2,)  # complex numbers are stored as pairs: optimisers and files know those
        modes = d_state if self.real else d_state // 2
        self.A_real = mark(nn.Parameter(torch.empty(d_model, modes)), 1e-3)
        self.A_imag = None if self.real else mark(nn.Parameter(torch.empty(d_model, modes)), 1e-3)
        self.B = mark(nn.Parameter(torch.empty(d_model, modes, *parts)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(d_model, modes, *parts)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.log_dt = mark(nn.Parameter(torch.empty(d_model)), 1e-3)
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Δ and C, and set A and B as the initialisation says."""
        if self.C.is_meta:
            return
        on_circle = self.initialization == "dfout"
        A, B = initial_modes("lin" if on_circle else self.initialization, self.d_state)
        with torch.no_grad():
            self.B.copy_(
                torch.from_numpy(B.real.copy() if self.real else np.stack([B.real, B.imag], -1)).expand_as(self.B)
            )
            nn.init.normal_(self.C, std=1 if self.real else math.sqrt(0.5))
            nn.init.normal_(self.D)
            log_uniform_(self.log_dt, self.dt_min, self.dt_max)
            if on_circle:
                dt = self.log_dt.double().exp().cpu().numpy()
                A = circle_modes(dt, self.d_state, self.discretization)
            set_real_part_(self.A_real, A.real, self.parameterization, "S4D")
            if self.A_imag is not None:
                self.A_imag.copy_(torch.from_numpy(A.imag.copy()).expand_as(self.A_imag))
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> S4DState:
        """Return zeros."""
        dtype = state_dtype(self.C)
        dtype = dtype if self.real else dtype.to_complex()
        return S4DState(torch.zeros(batch_size, *self.A_real.shape, dtype=dtype, device=self.C.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: S4DState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], S4DState]:
        """Return outputs and the state after the last step."""
        A, B, C, dt = self.system()
        if timeline is not None and timeline.dt is not None and timeline.dt.numel() == 1 and timeline.valid is None:
            # Another sampling rate throughout is another Δ: still a convolution.
            dt, timeline = dt * timeline.dt.to(dt.dtype).reshape(1), timeline._replace(dt=None)
        x, timeline = self._enter(x, timeline)
        # An exported graph takes any length, so it has the face that does.
        any_length = torch.compiler.is_exporting()
        if not any_length and x.shape[1] >= CONVOLUTION_FROM and all(entry is None for entry in timeline):
            y, final = self._convolve(x, A, B, C, dt, state)
            y = y + self.D * x
        else:
            steps = dt.expand(*x.shape) if timeline.dt is None else dt * timeline.dt.to(dt.dtype)[..., None]
            y, final = selective_scan(
                x,
                steps,
                A,
                B,
                C,
                self.D,
                None if state is None else state.ssm,
                discretization=self.discretization,
                start=timeline.start,
                valid=timeline.valid,
            )
        return zero_where_invalid(self.output(y.to(x.dtype)), timeline.valid), S4DState(final)

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A, B and C ``[d n]`` of the continuous systems and their steps Δ ``[d]``, in float32 at least."""
        dtype = state_dtype(self.C)
        A, B, C = real_part(self.A_real.to(dtype), self.parameterization), self.B.to(dtype), self.C.to(dtype)
        if self.A_imag is not None:
            A, B, C = torch.complex(A, self.A_imag.to(dtype)), torch.view_as_complex(B), torch.view_as_complex(C)
        return A, B, C, self.log_dt.to(dtype).exp()

    def sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Ā (in double precision; of the bilinear rule complex), B̄ and C ``[d n]``."""
        A, B, C, dt = self.system()
        return *self._sampled(A, B, dt), C

    def _sampled(self, A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        z = dt[:, None] * A
        # log Ā and its multiples in float64: a phase of thousands of radians has few digits left in float32.
        log_decay = z.to(torch.promote_types(z.dtype, torch.float64))
        if self.discretization == "bilinear":
            return log_bilinear(log_decay), B * (dt[:, None] / (1 - z / 2))
        return log_decay, B * (dt[:, None] * phi(z))

    def _convolve(
        self, x: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: S4DState | None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs without the skip, and the final state, by matrix products and transforms alone."""
        log_decay, B = self._sampled(A, B, dt)
        x, before = x.to(dt.dtype), None if state is None else state.ssm
        if B.is_complex() or not log_decay.is_complex():
            return convolve(x, log_decay, B, C, before)
        # A real Ā may be negative, and its logarithm complex: each mode is then both of a pair, with half the output.
        dtype = B.dtype.to_complex()
        y, final = convolve(x, log_decay, B.to(dtype), C.to(dtype) / 2, before)
        return y, final.real.contiguous()
