"""SGConv: a long convolution with few parameters, stretched over scales that weigh less the further back they lie."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import interpolate

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import OutputGate
from .long_conv import LongConvState, convolve_window


class SGConv(Mixer):
    """Convolve each channel with a kernel of parts of equal size, each stretched to the length of all before it.

        k = [w_0, ½ up(w_1, 1), ¼ up(w_2, 2), ⅛ up(w_3, 4), …] / ‖k at the beginning‖,    y = k * u + D ∘ u

    with up(w, m) the linear interpolation of w to m times its length.

    Args:
        d_model: Channels.
        part: Parameters of a part.
        n_scales: Parts; the kernel has part · 2^(n_scales − 1) taps.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the convolution alone).

    Raises:
        ValueError: If there is nothing to make a kernel of; in ``forward``, if the timeline has ``dt``: taps count
            steps.

    Source:
        Li et al., "What Makes Convolutional Models Great on Long Sequence Modeling?", ICLR 2023, section 3.
    """

    initial_norm: Tensor

    def __init__(
        self, d_model: int, part: int = 32, n_scales: int = 6, output: Literal["glu", "identity"] = "glu"
    ) -> None:
        super().__init__()
        check_choice("SGConv", "output", output, ("glu", "identity"))
        if part < 1 or n_scales < 1:
            raise ValueError(f"SGConv(part={part}, n_scales={n_scales}): wanted at least 1 of each, such as 32 and 6")
        self.d_model, self.part, self.n_scales = d_model, part, n_scales
        self.length = part * 2 ** (n_scales - 1)
        self.weight = mark(nn.Parameter(torch.empty(n_scales, d_model, part)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.register_buffer("initial_norm", torch.empty(d_model, 1))
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw parts and skip, and keep the norm that kernels have with them."""
        nn.init.normal_(self.weight)
        nn.init.normal_(self.D)
        with torch.no_grad():
            self.initial_norm.copy_(self._stretched().norm(dim=1, keepdim=True))
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def kernel(self) -> Float[Tensor, "d l"]:
        """Return the taps, in float32 at least."""
        return self._stretched() / self.initial_norm

    def _stretched(self) -> Tensor:
        parts = []
        for i, part in enumerate(self.weight.to(state_dtype(self.weight))):
            stretch = 2 ** max(0, i - 1)
            wide = part if stretch == 1 else interpolate(part[None], scale_factor=stretch, mode="linear")[0]
            parts.append(wide * 0.5**i)
        return torch.cat(parts, 1)

    def initial_state(self, batch_size: int) -> LongConvState:
        """Return a window of zeros."""
        return LongConvState(self.weight.new_zeros(batch_size, self.length - 1, self.d_model))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LongConvState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LongConvState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        window = None if state is None else state.window
        y, window = convolve_window(x, self.kernel(), self.D, window, timeline)
        return zero_where_invalid(self.output(y), timeline.valid), LongConvState(window)
