"""LongConv: a long convolution whose taps are learned one by one."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import dropout, relu

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import convolution
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import OutputGate


class LongConvState(NamedTuple):
    """The last inputs, as many as the kernel has taps but one."""

    window: Float[Tensor, "b window d"]


class LongConv(Mixer):
    """Convolve each channel with a kernel of its own, squashed so that small taps are none.

        y_t = Σ_{i<l} k_i ∘ u_{t−i} + D ∘ u_t,    k = relu(|w| − λ) sign(w)

    Args:
        d_model: Channels.
        length: Taps of the kernel; inputs further back than that are forgotten.
        squash: λ.
        kernel_dropout: How likely a tap is left out in training.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the convolution alone).

    Raises:
        ValueError: If an option makes no sense; in ``forward``, if the timeline has ``dt``: taps count steps.

    Source:
        Fu et al., arXiv:2302.06646, section 3 (squash, kernel dropout).
    """

    def __init__(
        self,
        d_model: int,
        length: int = 1024,
        squash: float = 3e-3,
        kernel_dropout: float = 0.1,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("LongConv", "output", output, ("glu", "identity"))
        if length < 1 or not squash >= 0 or not 0 <= kernel_dropout < 1:
            raise ValueError(
                f"LongConv(length={length}, squash={squash}, kernel_dropout={kernel_dropout}): wanted at least one tap,"
                " a squash of 0 or more, such as 0.003, and a dropout from 0 to below 1, such as 0.1"
            )
        self.d_model, self.length, self.squash, self.kernel_dropout = d_model, length, squash, kernel_dropout
        self.weight = mark(nn.Parameter(torch.empty(d_model, length)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw taps that fade at rates spread over the channels, and the skip."""
        nn.init.normal_(self.weight)
        nn.init.normal_(self.D)
        if self.weight.is_meta:
            return
        with torch.no_grad():
            # From 1 to e⁻¹ over the whole length in one channel, to e⁻¹ over a hundredth of it in another.
            rate = torch.logspace(0, 2, self.d_model, dtype=torch.float64, device=self.weight.device)[:, None]
            age = torch.arange(self.length, dtype=torch.float64, device=self.weight.device) / self.length
            fade = torch.exp(-rate * age)
            self.weight.mul_((fade / fade.square().sum(1, keepdim=True).sqrt()).to(self.weight.dtype))
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def kernel(self) -> Float[Tensor, "d l"]:
        """Return the squashed taps, in float32 at least."""
        weight = self.weight.to(state_dtype(self.weight))
        return relu(weight.abs() - self.squash) * weight.sign()

    def initial_state(self, batch_size: int) -> LongConvState:
        """Return a window of zeros."""
        return LongConvState(self.weight.new_zeros(batch_size, self.length - 1, self.d_model))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LongConvState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], LongConvState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        kernel = dropout(self.kernel(), self.kernel_dropout, self.training)
        y, window = convolve_window(x, kernel, self.D, None if state is None else state.window, timeline)
        return zero_where_invalid(self.output(y), timeline.valid), LongConvState(window)


def convolve_window(
    x: Tensor, kernel: Tensor, skip: Tensor, window: Tensor | None, timeline: Timeline
) -> tuple[Tensor, Tensor]:
    """Return the convolution with a kernel of fixed length and a skip, in the type of the inputs, and the last inputs.

    Whatever the type of the inputs, the sum over taps is in that of the kernel.
    """
    y, final = convolution.long(x.to(kernel.dtype), kernel, window, start=timeline.start, valid=timeline.valid)
    return (y + skip.to(kernel.dtype) * x).to(x.dtype), final.to(x.dtype)
