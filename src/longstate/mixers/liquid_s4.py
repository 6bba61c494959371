"""Liquid-S4: a diagonal state space model that also remembers products of neighbouring inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Inexact, Tensor
from ..ops import convolution
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, state_dtype
from ._diagonal import run_modes
from ._parts import OutputGate
from .s4d import S4D


class LiquidS4State(NamedTuple):
    """The last inputs, as many as are multiplied but one, and the state of every channel's modes."""

    window: Float[Tensor, "b window d"]
    ssm: Inexact[Tensor, "b d n"]


class LiquidS4(Mixer):
    """Run S4D, and the same modes driven by products of the last inputs.

        h_t = Ā h_{t−1} + Σ_{p≤P} B̄^p u_t u_{t−1} … u_{t−p+1},    y_t = 2 Re(Cᵀ h_t) + D u_t

    With its state written out, the system x_t = (Ā + B̄ u_t) ∘ x_{t−1} + B̄ u_t, in which inputs change how fast the
    state fades, is a sum of such terms over all subsets of the inputs. Kept are those of up to P neighbours: all of
    them ("kb"), or beyond the linear ones only those that end at the present, which pass through no state ("pb"):

        y_t = 2 Re Cᵀ (h_t + Σ_{2≤p≤P} B̄^p u_t … u_{t−p+1}) + D u_t,    h_t = Ā h_{t−1} + B̄ u_t

    Powers are taken entry by entry. A product reaches over no step that does not count, and behind no start.

    Args:
        d_model: Channels.
        d_state: Real states of a channel; of each conjugate pair of modes one is kept.
        order: P, at least 2.
        kernel: "kb" or "pb".
        initialization: As of ``S4D``.
        discretization: As of ``S4D``.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the system alone).

    Raises:
        ValueError: If an option makes no sense; in ``forward``, if the timeline has ``dt``: products count steps.

    Source:
        Hasani et al., arXiv:2209.12951.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        order: int = 2,
        kernel: Literal["kb", "pb"] = "kb",
        initialization: str = "legs",
        discretization: Literal["zoh", "bilinear"] = "bilinear",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("LiquidS4", "kernel", kernel, ("kb", "pb"))
        check_choice("LiquidS4", "output", output, ("glu", "identity"))
        if order < 2:
            raise ValueError(f"LiquidS4(order={order}): products have at least 2 inputs. Take 2, or S4D for none.")
        if initialization == "real" and discretization == "bilinear":
            raise ValueError(
                "LiquidS4(initialization='real', discretization='bilinear'): a long step makes negative modes, which"
                " have no logarithm. Take discretization='zoh'."
            )
        self.d_model, self.order, self.kernel = d_model, order, kernel
        self.s4d = S4D(
            d_model, d_state, initialization, discretization, dt_min=dt_min, dt_max=dt_max, output="identity"
        )
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw Δ and C, and set A and B as the initialisation says."""
        self.s4d.reset_parameters()
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> LiquidS4State:
        """Return zeros."""
        window = self.s4d.D.new_zeros(batch_size, self.order - 1, self.d_model)
        return LiquidS4State(window, self.s4d.initial_state(batch_size).ssm)

    def forward(
        self, x: Float[Tensor, "b t d"], state: LiquidS4State | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LiquidS4State]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        window, before = (None, None) if state is None else state
        earlier, window = self._earlier(x, window, timeline)
        log_decay, B, C = self.s4d.sampled()
        product = u = x.to(state_dtype(self.s4d.D))
        y, final = run_modes(u, log_decay, B, C, before, timeline)
        for p in range(2, self.order + 1):
            product = product * earlier[p - 2]
            if self.kernel == "kb":
                of_product, written = run_modes(product, log_decay, B**p, C, None, timeline)
                y, final = y + of_product, final + written
            else:
                gain = (C * B**p).sum(-1)
                y = y + (2 * gain.real if gain.is_complex() else gain) * product
        y = (y + self.s4d.D * u).to(x.dtype)
        return zero_where_invalid(self.output(y), timeline.valid), LiquidS4State(window, final)

    def _earlier(self, x: Tensor, window: Tensor | None, timeline: Timeline) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return u_{t−1} … u_{t−P+1} with zeros behind starts, and the last inputs."""
        count = self.order - 1
        taps = torch.eye(count, self.order, dtype=x.dtype, device=x.device).flip(0)  # the oldest input first
        delayed, final = convolution.short(
            x.repeat(1, 1, count),
            taps.repeat_interleave(self.d_model, 0),
            None,
            None if window is None else window.repeat(1, 1, count),
            start=timeline.start,
            valid=timeline.valid,
        )
        return delayed.chunk(count, -1), final[..., : self.d_model].clone()
