"""FFM: Fast and Forgetful Memory, a sum of what came in that fades and turns at many rates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .._shapes import Float, Inexact, Tensor
from ..ops import scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import Linear


class FFMState(NamedTuple):
    """The memory: each entry of the gated input at every frequency."""

    ssm: Inexact[Tensor, "b m n"]


class FFM(Mixer):
    """Keep gated inputs that fade each at its rate and turn at every frequency, and read them through a gate.

        S_t = e^{(−|α_i| + iω_j) Δ_t} ∘ S_{t−1} + x̃_t 1ᵀ,    x̃ = (W₁ x + b₁) ∘ σ(W₂ x + b₂)
        y = LN(W₃ [Re S, Im S] + b₃) ∘ g + (W₅ x + b₅) ∘ (1 − g),    g = σ(W₄ x + b₄)

    An input arrives at an instant: what was there before decays over the time Δ that has passed, the input is added
    whole.

    Args:
        d_model: Channels.
        d_memory: Entries of the gated input, each with a decay α.
        d_context: Frequencies ω.
        decay_min: Smallest initial α, per nominal step.
        decay_max: Largest initial α; they are spaced evenly.
        period_min: Shortest initial period 2π/ω, in nominal steps.
        period_max: Longest initial period; they are spaced evenly.
        norm_eps: ε of the layer norm.

    Raises:
        ValueError: If there is no entry or frequency, or a range is none.

    Source:
        Morad et al., arXiv:2310.04128.
    """

    def __init__(
        self,
        d_model: int,
        d_memory: int = 32,
        d_context: int = 4,
        decay_min: float = 1e-6,
        decay_max: float = 0.1,
        period_min: float = 1.0,
        period_max: float = 1024.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(d_memory, d_context) < 1:
            raise ValueError(f"FFM(d_memory={d_memory}, d_context={d_context}): sizes start at 1. Try 32 and 4.")
        if not 0 < decay_min <= decay_max or not 0 < period_min <= period_max:
            raise ValueError(
                f"FFM(decay_min={decay_min}, decay_max={decay_max}, period_min={period_min}, period_max={period_max}):"
                " wanted 0 < min ≤ max of each, such as 1e-6 and 0.1, and 1 and 1024"
            )
        self.d_model, self.d_memory, self.d_context, self.norm_eps = d_model, d_memory, d_context, norm_eps
        self.decay_min, self.decay_max, self.period_min, self.period_max = decay_min, decay_max, period_min, period_max
        self.alpha = mark(nn.Parameter(torch.empty(d_memory)), 1e-3)
        self.omega = mark(nn.Parameter(torch.empty(d_context)), 1e-3)
        self.in_proj = Linear(d_model, 2 * d_memory)  # W₁ and W₂
        self.h_proj = Linear(2 * d_memory * d_context, d_model)  # W₃
        self.x_proj = Linear(d_model, 2 * d_model)  # W₄ and W₅
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Space decays and periods over their ranges, and draw the projections."""
        with torch.no_grad():
            self.alpha.copy_(torch.linspace(self.decay_min, self.decay_max, self.d_memory, dtype=torch.float64))
            periods = torch.linspace(self.period_min, self.period_max, self.d_context, dtype=torch.float64)
            self.omega.copy_(2 * math.pi / periods)
        for projection in (self.in_proj, self.h_proj, self.x_proj):
            projection.reset_parameters()

    def initial_state(self, batch_size: int) -> FFMState:
        """Return zeros."""
        shape, dtype = (batch_size, self.d_memory, self.d_context), state_dtype(self.alpha).to_complex()
        return FFMState(torch.zeros(shape, dtype=dtype, device=self.alpha.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: FFMState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], FFMState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        dtype = state_dtype(self.alpha)
        decay, turn = torch.broadcast_tensors(-self.alpha.to(dtype).abs()[:, None], self.omega.to(dtype))
        exponent = torch.complex(decay, turn)
        if timeline.dt is not None:
            exponent = timeline.dt.to(dtype)[..., None, None] * exponent
        gated = functional.glu(self.in_proj(x)).to(exponent.dtype)
        S, final = scan(
            torch.exp(exponent),
            gated[..., None].expand(*gated.shape, self.d_context),
            None if state is None else state.ssm,
            start=timeline.start,
            valid=timeline.valid,
        )
        z = self.h_proj(torch.cat([S.real, S.imag], -1).flatten(-2).to(x.dtype))
        read = functional.layer_norm(z, (self.d_model,), eps=self.norm_eps)
        through, gate = self.x_proj(x).chunk(2, -1)
        y = torch.lerp(through, read, torch.sigmoid(gate))
        return zero_where_invalid(y.to(x.dtype), timeline.valid), FFMState(final)
