"""TNN: a Toeplitz network, whose taps a small network writes and a decay shortens."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import relu, silu

from .._shapes import Float, Inexact, Tensor
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._diagonal import run_modes
from ._implicit import convolve_all, linear_in, refuse_state
from ._parts import Linear, RMSNorm


class TNNState(NamedTuple):
    """The modes of every channel's kernel."""

    ssm: Inexact[Tensor, "b d n"]


class TNN(Mixer):
    """Multiply each channel by a Toeplitz matrix, next to a gate.

        y = W_o (SiLU(W_u x) ∘ (k * SiLU(W_v x))),    k_i = decay^i · MLP(i)

    As it is, the kernel is as long as the input, and there is no state. With ``state_for`` taps, the first so many are
    written as a sum of that many modes, exactly, and the mixer runs with these as its state: the same outputs for as
    many steps, and a kernel that goes on periodically, but for its decay, beyond.

        k_i = Σ_s b_s (decay · e^{−2πis/(l+1)})^i,    b = the inverse Fourier transform of [k′_0, …, k′_{l−1}, −Σ k′]
        with k′ the taps before their decay

    Args:
        d_model: Channels.
        d_inner: Channels of the convolution; ``d_model`` when absent.
        d_hidden: Width of the network that writes taps.
        n_layers: Its hidden layers.
        decay: What each tap is shortened by against the one before.
        state_for: Steps for which the state is exact; no state when absent. ``with_state`` converts a trained mixer.

    Raises:
        ValueError: If sizes make no sense; in ``forward``, if there is a state that cannot be, or the timeline has
            ``dt``: taps count steps.

    Source:
        Qin et al., "Toeplitz Neural Network for Sequence Modeling", ICLR 2023; the conversion (ETSC): Qin and Zhong,
        "Accelerating Toeplitz Neural Network with Constant-time Inference Complexity", EMNLP 2023.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        d_hidden: int = 64,
        n_layers: int = 3,
        decay: float = 0.99,
        state_for: int | None = None,
    ) -> None:
        super().__init__()
        inner = d_model if d_inner is None else d_inner
        if min(inner, d_hidden, n_layers) < 1 or not 0 < decay <= 1:
            raise ValueError(
                f"TNN(d_inner={d_inner}, d_hidden={d_hidden}, n_layers={n_layers}, decay={decay}): wanted sizes of at"
                " least 1 and a decay above 0 and up to 1, such as 0.99"
            )
        _check_steps(state_for)
        self.d_model, self.d_inner, self.decay, self.state_for = d_model, inner, decay, state_for
        self.u_proj = Linear(d_model, inner)
        self.v_proj = Linear(d_model, inner)
        self.o_proj = Linear(inner, d_model)
        widths = [1] + [d_hidden] * (n_layers + 1) + [inner]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(RMSNorm(d_hidden) for _ in widths[1:-1])
        for layer in self.layers:
            for parameter in layer.parameters():
                mark(parameter)

    def reset_parameters(self) -> None:
        """Draw the projections and the network."""
        for module in (self.u_proj, self.v_proj, self.o_proj, *self.layers, *self.norms):
            module.reset_parameters()

    def with_state(self, steps: int) -> TNN:
        """Return a copy that has a state, exact for so many steps."""
        _check_steps(steps)
        other = copy.deepcopy(self)
        other.state_for = steps
        return other

    def taps(self, count: int) -> Float[Tensor, "d l"]:
        """Return the first taps before their decay, in float32 at least."""
        dtype = state_dtype(self.o_proj.weight)
        first, *others = self.layers
        z = torch.arange(count, dtype=dtype, device=self.o_proj.weight.device)[:, None]
        z = linear_in(first, z)
        norms: list[Any] = list(self.norms)
        for layer, norm in zip(others, norms, strict=True):
            z = relu(z * torch.rsqrt(z.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.to(dtype))
            z = linear_in(layer, z)
        return z.mT

    def initial_state(self, batch_size: int) -> TNNState | None:
        """Return zeros, or None where there is no state."""
        if self.state_for is None:
            return None
        weight = self.o_proj.weight
        shape = (batch_size, self.d_inner, (self.state_for + 1) // 2)
        return TNNState(torch.zeros(shape, dtype=state_dtype(weight).to_complex(), device=weight.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: Any = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], TNNState | None]:
        """Return outputs and the state after the last step, if there is one."""
        if self.state_for is None:
            refuse_state("TNN", state, ", or convert the mixer: tnn.with_state(steps)")
        x, timeline = self._enter(x, timeline, timed=False)
        gate, v = silu(self.u_proj(x)), silu(self.v_proj(x))
        u = v.to(state_dtype(self.o_proj.weight))
        if self.state_for is None:
            taps = self.taps(x.shape[1])
            age = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
            y, final = convolve_all(u, taps * (self.decay**age).to(taps.dtype), timeline), None
        else:
            log_decay, weights = modes_of(self.taps(self.state_for))
            log_decay = (log_decay + math.log(self.decay)).expand_as(weights)
            before = None if state is None else state.ssm
            y, after = run_modes(u, log_decay, torch.ones_like(weights), weights, before, timeline)
            final = TNNState(after)
        return zero_where_invalid(self.o_proj(gate * y.to(x.dtype)), timeline.valid), final


def modes_of(taps: Float[Tensor, "d l"]) -> tuple[Inexact[Tensor, " n"], Inexact[Tensor, "d n"]]:
    """Return log λ (in double precision) and b with taps_i = 2 Re Σ_s b_s λ_s^i: one of each conjugate pair.

    The one tap more that is put behind them makes their sum zero, and with it the mode that would never fade.
    """
    count = taps.shape[1] + 1
    longer = torch.cat([taps, -taps.sum(1, keepdim=True)], 1)
    b = torch.fft.rfft(longer.double(), n=count).conj()[:, 1:] / count
    if count % 2 == 0:  # the last mode is its own conjugate
        b = torch.cat([b[:, :-1], b[:, -1:] / 2], 1)
    index = torch.arange(1, b.shape[1] + 1, dtype=torch.float64, device=taps.device)
    weights = torch.complex(b.real.to(taps.dtype), b.imag.to(taps.dtype))
    return torch.complex(torch.zeros_like(index), -2 * math.pi * index / count), weights


def _check_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ValueError(f"TNN(state_for={steps}): a state is exact for at least one step, or None for no state")
