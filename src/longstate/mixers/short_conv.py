"""ShortConv: a short convolution between two gates, as in LFM2."""

from __future__ import annotations

from typing import NamedTuple

from .._shapes import Float, Tensor
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer
from ._parts import Linear, ShortConvolution


class ShortConvState(NamedTuple):
    """The window of the convolution: its last inputs."""

    conv: Float[Tensor, "b window d"]


class ShortConv(Mixer):
    """Convolve each channel with a few taps, between a gate on the input and one on the output.

        [B, C, x] = W_in u;    y_t = W_out(C_t ∘ conv(B ∘ x)_t)

    There is no activation: outputs are polynomials of the inputs.

    Args:
        d_model: Channels.
        d_conv: Taps of the convolution; each output sees so many steps.
        bias: Whether the projections and the convolution have biases.

    Raises:
        ValueError: If there is no tap; in ``forward``, if the timeline has ``dt``: the convolution counts steps.

    Source:
        Liquid AI, LFM2 Technical Report, arXiv:2511.23404.
    """

    def __init__(self, d_model: int, d_conv: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.d_model = d_model
        self.in_proj = Linear(d_model, 3 * d_model, bias=bias)
        self.conv1d = ShortConvolution(d_model, d_conv, bias, activation=None)
        self.out_proj = Linear(d_model, d_model, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the projections and the taps."""
        for module in (self.in_proj, self.conv1d, self.out_proj):
            module.reset_parameters()

    def initial_state(self, batch_size: int) -> ShortConvState:
        """Return a window of zeros."""
        return ShortConvState(self.conv1d.initial_state(batch_size))

    def forward(
        self, x: Float[Tensor, "b t d"], state: ShortConvState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], ShortConvState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        B, C, u = self.in_proj(x).chunk(3, -1)
        y, window = self.conv1d(B * u, None if state is None else state.conv, timeline)
        return zero_where_invalid(self.out_proj(C * y), timeline.valid), ShortConvState(window)
