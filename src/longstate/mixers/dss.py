"""DSS: diagonal state spaces, whose modes all channels share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Inexact, Tensor
from ..ops import selective_scan
from ..systems import diagonal_modes, legs_normal
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._diagonal import run_modes
from ._parts import OutputGate, check_steps, log_uniform_

_EPSILON = 1e-7  # in the reciprocal of the normalising sum
_STEEPEST = 30.0  # e-folds by which a kernel may rise over its length: float32 tells 16 of them from nothing


class DSSState(NamedTuple):
    """The state of every channel's modes."""

    ssm: Inexact[Tensor, "b d n"]


class DSS(Mixer):
    """Run one diagonal linear time-invariant system for each channel; they differ in steps and read-outs.

        K_l = Re Σ_n W_n (e^{z_n} − 1)/λ_n e^{z_n l},    Re λ = −e^{A_real}                  kernel="exp"
        K_l = Re Σ_n W_n/λ_n e^{z_n l} / Σ_{j<L} e^{z_n j},    Re λ = A_real                 kernel="softmax"

    y = K * u + D u with z = Δ₁ Re λ + iΔ₂ Im λ. Where Re λ > 0, a softmax kernel rises up to lag L − 1, and numerator
    and denominator are divided by e^{z(L−1)} first. The reciprocal of the sum x is x̄/(|x|² + 10⁻⁷). Both run
    as recurrences too, h_t = e^z h_{t−1} + b u_t, with b = (e^z − 1)/λ or 1/(λ Σ_j e^{zj}). A rising mode goes on
    rising after L steps, and with it the state: keep to sequences of at most L steps (``start`` begins one). Re z is
    held at or below 30/(L − 1).

    Args:
        d_model: Channels.
        d_state: Complex modes, shared by all channels.
        kernel: "exp" or "softmax".
        length: L, the lags over which "softmax" normalises: the length of the sequences in training.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly, Δ₁ = Δ₂.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option is none of those, there is no mode, or a length is missing or without use; in
            ``forward``, if the timeline has ``dt`` for "softmax", which normalises over steps.

    Source:
        Gupta, Gu and Berant, Diagonal state spaces are as effective as structured state spaces (2022).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        kernel: Literal["exp", "softmax"] = "exp",
        length: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("DSS", "kernel", kernel, ("exp", "softmax"))
        check_choice("DSS", "output", output, ("glu", "identity"))
        if d_state < 1:
            raise ValueError(f"DSS(d_state={d_state}): there is at least one mode. Try d_state=64.")
        if kernel == "softmax" and (length is None or length < 1):
            raise ValueError(f"DSS(kernel='softmax', length={length}): it normalises over lags. Try length=1024.")
        if kernel == "exp" and length is not None:
            raise ValueError(f"DSS(kernel='exp', length={length}): nothing is normalised over a length. Leave it out.")
        check_steps("DSS", dt_min, dt_max)
        self.d_model, self.d_state, self.kernel, self.length = d_model, d_state, kernel, length
        self.dt_min, self.dt_max = dt_min, dt_max
        self.A_real = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        self.A_imag = mark(nn.Parameter(torch.empty(d_state)), 1e-3)
        # Complex numbers are stored as pairs: optimisers and files know those.
        self.W = mark(nn.Parameter(torch.empty(d_model, d_state, 2)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.log_dt = mark(nn.Parameter(torch.empty(d_model, 2)), 1e-3)
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set λ to the upper eigenvalues of the normal part of HiPPO-LegS, and draw Δ, W and D."""
        if self.W.is_meta:
            return
        modes = torch.from_numpy(diagonal_modes(*legs_normal(2 * self.d_state)).eigenvalues)
        with torch.no_grad():
            self.A_real.copy_((-modes.real).log() if self.kernel == "exp" else modes.real)
            self.A_imag.copy_(modes.imag)
            nn.init.normal_(self.W)
            nn.init.normal_(self.D)
            log_uniform_(self.log_dt, self.dt_min, self.dt_max)
            self.log_dt[:, 1] = self.log_dt[:, 0]
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> DSSState:
        """Return zeros."""
        shape, dtype = (batch_size, self.d_model, self.d_state), state_dtype(self.W).to_complex()
        return DSSState(torch.zeros(shape, dtype=dtype, device=self.W.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: DSSState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], DSSState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=self.kernel == "exp")
        eigenvalues, z = self.modes()
        W = torch.view_as_complex(self.W.to(state_dtype(self.W)))
        u, C, initial = x.to(W.real.dtype), W / 2, None if state is None else state.ssm  # half of twice the real part
        if timeline.dt is None:
            gain = torch.expm1(z) / eigenvalues if self.length is None else normalised(eigenvalues, z, self.length)
            y, final = run_modes(u, z, gain.to(W.dtype), C, initial, timeline)
        else:
            y, final = selective_scan(
                u,
                timeline.dt.to(u.dtype)[..., None].expand(u.shape),
                z.to(W.dtype),
                (z / eigenvalues).to(W.dtype),
                C,
                None,
                initial,
                discretization="zoh",
                start=timeline.start,
                valid=timeline.valid,
            )
        y = (y + self.D * u).to(x.dtype)
        return zero_where_invalid(self.output(y), timeline.valid), DSSState(final)

    def modes(self) -> tuple[Inexact[Tensor, " n"], Inexact[Tensor, "d n"]]:
        """Return λ and the logarithms z of what the modes are multiplied with in a step, in double precision."""
        real, imag, dt = self.A_real.double(), self.A_imag.double(), self.log_dt.double().exp()
        real = -real.exp() if self.kernel == "exp" else real
        z_real = dt[:, :1] * real
        if self.length is not None:
            z_real = z_real.clamp(max=_STEEPEST / max(self.length - 1, 1))
        return torch.complex(real, imag), torch.complex(z_real, dt[:, 1:] * imag)


def normalised(eigenvalues: Inexact[Tensor, " n"], z: Inexact[Tensor, "d n"], length: int) -> Inexact[Tensor, "d n"]:
    """Return 1/(λ Σ_{l<length} e^{zl}), with the reciprocal of a sum that may vanish, and no overflow."""
    rising = z.real > 0
    last = torch.where(rising, z * (length - 1), 0)
    total = geometric_sum(torch.where(rising, -z, z), length)  # of e^{zl − last}, backwards where it rises
    return torch.exp(-last) * total.conj() / (total.abs().square() + _EPSILON) / eigenvalues


def geometric_sum(z: Inexact[Tensor, "d n"], length: int) -> Inexact[Tensor, "d n"]:
    """Return Σ_{l<length} e^{zl} by doubling: no difference is taken, so nothing cancels where e^z is near 1.

    S_{2m} = S_m (1 + e^{mz}),    S_{m+1} = S_m + e^{mz}
    """
    total, count = torch.ones_like(z), 1
    for bit in bin(length)[3:]:
        total, count = total * (1 + torch.exp(count * z)), 2 * count
        if bit == "1":
            total, count = total + torch.exp(count * z), count + 1
    return total
