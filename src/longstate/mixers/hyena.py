"""Hyena: long convolutions with kernels that a small network writes, between multiplications."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .._shapes import Float, Tensor
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._implicit import convolve_all, linear_in, refuse_state
from ._parts import Linear, ShortConvolution


class HyenaFilter(nn.Module):
    """Write the taps of kernels from their positions.

        k_i = MLP(τ, cos 2πfτ, −sin 2πfτ) ∘ (e^{−τ δ} + shift),    τ = i / length,    activation sin(frequency ∘ ·)

    Frequencies f go from 10⁻⁴ to (bands − 1) in equal steps. Rates δ are spread over the channels, so that one has
    fallen to a hundredth after 0.3 lengths and the last after 1.5.

    Args:
        width: Kernels.
        length: Steps to the unit of position; kernels may be longer.
        d_hidden: Width of the network.
        n_layers: Hidden layers.
        bands: Frequencies.
        shift: What the window does not fall below.
    """

    def __init__(self, width: int, length: int, d_hidden: int, n_layers: int, bands: int, shift: float) -> None:
        super().__init__()
        if min(width, length, d_hidden, n_layers, bands) < 1:
            raise ValueError(
                f"Hyena(length={length}, d_hidden={d_hidden}, n_layers={n_layers}, bands={bands}): wanted at least 1"
                " of each, such as 1024, 64, 2 and 16"
            )
        self.width, self.length, self.bands, self.shift = width, length, bands, shift
        widths = [1 + 2 * bands] + [d_hidden] * n_layers
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.last = Linear(d_hidden, width, bias=False)
        self.frequency = mark(nn.Parameter(torch.empty(d_hidden)))
        for layer in [*self.layers, self.last]:
            for parameter in layer.parameters():
                mark(parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the layers; every sine begins with frequency 1."""
        for layer in [*self.layers, self.last]:
            layer.reset_parameters()
        nn.init.ones_(self.frequency)

    def forward(self, taps: int) -> Float[Tensor, "d l"]:
        """Return the first taps, in float32 at least. They do not depend on how many there are."""
        dtype = state_dtype(self.frequency)
        position = torch.arange(taps, dtype=torch.float64, device=self.frequency.device)[:, None] / self.length
        frequencies = torch.linspace(1e-4, self.bands - 1, self.bands, dtype=torch.float64, device=position.device)
        phase = 2 * math.pi * frequencies * position
        z = torch.cat([position, phase.cos(), -phase.sin()], 1).to(dtype)
        for layer in self.layers:
            z = torch.sin(self.frequency.to(dtype) * linear_in(layer, z))
        rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, self.width, device=z.device, dtype=dtype)
        window = torch.exp(-position.to(dtype) * rates) + self.shift
        return (linear_in(self.last, z) * window).mT


class Hyena(Mixer):
    """Multiply projections with each other and with long convolutions, in turn.

        [v, x_1, …, x_N] = conv(W_in u);    z_1 = v,    z_{n+1} = x_n ∘ (k_n * z_n + D_n ∘ z_n);    y = W_out z_{N+1}

    conv is a short causal convolution, and k_n are kernels that a network writes (``HyenaFilter``): as long as the
    input, so that there is no state. In training a sequence of t steps costs O(t log t).

    Args:
        d_model: Channels.
        length: Steps to the unit of position of the kernels; longer inputs have longer kernels.
        order: N, long convolutions one after the other.
        d_conv: Taps of the short convolution.
        d_hidden: Width of the network that writes kernels.
        n_layers: Its hidden layers.
        bands: Frequencies of the positions it sees.
        shift: What the windows of kernels do not fall below.

    Raises:
        ValueError: If a size is less than 1; in ``forward``, if there is a state, or the timeline has ``dt``.

    Source:
        Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models", ICML 2023, section 3.
    """

    def __init__(
        self,
        d_model: int,
        length: int = 1024,
        order: int = 2,
        d_conv: int = 3,
        d_hidden: int = 64,
        n_layers: int = 2,
        bands: int = 16,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"Hyena(order={order}): wanted at least one long convolution, such as 2")
        self.d_model, self.order = d_model, order
        self.in_proj = Linear(d_model, (order + 1) * d_model)
        self.conv1d = ShortConvolution((order + 1) * d_model, d_conv, bias=True, activation=None)
        self.filter = HyenaFilter(order * d_model, length, d_hidden, n_layers, bands, shift)
        self.D = mark(nn.Parameter(torch.empty(order, d_model)))
        self.out_proj = Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw projections, taps, the network and the skips."""
        for module in (self.in_proj, self.conv1d, self.filter, self.out_proj):
            module.reset_parameters()
        nn.init.normal_(self.D)

    def initial_state(self, batch_size: int) -> None:
        """Return None: a kernel as long as its input has no finite state."""

    def forward(
        self, x: Float[Tensor, "b t d"], state: Any = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], None]:
        """Return outputs, and no state."""
        refuse_state("Hyena", state, ", or fit a state space model to the kernels (realization) and run that")
        x, timeline = self._enter(x, timeline, timed=False)
        dtype = state_dtype(self.D)
        projected, _ = self.conv1d(self.in_proj(x), None, timeline)
        z, *gates = projected.to(dtype).chunk(self.order + 1, -1)
        kernels = self.filter(x.shape[1]).chunk(self.order)
        for gate, kernel, skip in zip(gates, kernels, self.D.to(dtype), strict=True):
            z = gate * (convolve_all(z, kernel, timeline) + skip * z)
        return zero_where_invalid(self.out_proj(z.to(x.dtype)), timeline.valid), None
