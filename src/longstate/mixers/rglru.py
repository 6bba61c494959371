"""RG-LRU: Griffin's recurrent block, a linear recurrence with gates of its input and of its decay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .._shapes import Bool, Float, Tensor
from ..ops import scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import Linear, ShortConvolution, softplus_inverse

# log a = −8 r softplus(Λ): a gate half open halves the logarithm of the least decay.
_SHARPNESS = 8.0

# The least that 1 − a² counts as under the root, whose derivative at a = 1 is infinite. From here up, that times the
# derivative of 1 − a² by any parameter is finite and right; below, both the root and its slopes are nothing.
_TINY = 1e-30


class RGLRUState(NamedTuple):
    """The window of the convolution, the state of every channel, and whether a step of the sequence has counted."""

    conv: Float[Tensor, "b window d"]
    h: Float[Tensor, "b d"]
    begun: Bool[Tensor, " b"]


class RGLRU(Mixer):
    """Run a linear recurrence for each channel, with gates on its input and its decay, behind a short convolution.

        x = conv(W_x u + b_x);    r = σ(x W_r + b_r),  i = σ(x W_i + b_i);    log a = −8 r ∘ softplus(Λ)
        h_t = a_t ∘ h_{t−1} + √(1 − a_t²) ∘ i_t ∘ x_t,    out_t = W_out(h_t ∘ GELU(W_y u_t + b_y)) + b_out

    The first step of a sequence has no past, and no root before its input: h_0 = i_0 ∘ x_0.

    Args:
        d_model: Channels.
        d_inner: Channels of the recurrence; ``d_model`` when absent.
        n_heads: Blocks on the diagonals of W_r and W_i; a gate sees the channels of its block only.
        d_conv: Taps of the short convolution.

    Raises:
        ValueError: If the inner channels do not divide into blocks; in ``forward``, if the timeline has ``dt``: the
            recurrence counts steps.

    Source:
        De et al., arXiv:2402.19427, section 2.4.
    """

    def __init__(self, d_model: int, d_inner: int | None = None, n_heads: int = 1, d_conv: int = 4) -> None:
        super().__init__()
        inner = d_model if d_inner is None else d_inner
        if inner < 1 or n_heads < 1 or inner % n_heads:
            raise ValueError(
                f"RGLRU(d_model={d_model}, d_inner={d_inner}, n_heads={n_heads}): {inner} inner channels do not divide "
                f"into {n_heads} blocks. Choose a multiple of n_heads, or a divisor of {inner} for n_heads."
            )
        self.d_model, self.d_inner, self.n_heads = d_model, inner, n_heads
        width = inner // n_heads
        self.linear_x = Linear(d_model, inner)
        self.linear_y = Linear(d_model, inner)
        self.conv1d = ShortConvolution(inner, d_conv, bias=True, activation=None)
        self.Lambda = mark(nn.Parameter(torch.empty(inner)))
        self.input_gate_weight = nn.Parameter(torch.empty(n_heads, width, width))
        self.input_gate_bias = mark(nn.Parameter(torch.empty(n_heads, width)))
        self.recurrence_gate_weight = nn.Parameter(torch.empty(n_heads, width, width))
        self.recurrence_gate_bias = mark(nn.Parameter(torch.empty(n_heads, width)))
        self.linear_out = Linear(inner, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Λ so that the decay under an open gate is uniform in [0.9, 0.999], and the rest as linear layers are."""
        for module in (self.linear_x, self.linear_y, self.conv1d, self.linear_out):
            module.reset_parameters()
        with torch.no_grad():
            for weight in (self.input_gate_weight, self.recurrence_gate_weight):
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
            for bias in (self.input_gate_bias, self.recurrence_gate_bias):
                nn.init.zeros_(bias)
            nn.init.uniform_(self.Lambda, 0.9, 0.999)
            self.Lambda.copy_(softplus_inverse(-self.Lambda.log() / _SHARPNESS))

    def initial_state(self, batch_size: int) -> RGLRUState:
        """Return zeros, and that nothing has begun."""
        return RGLRUState(
            self.conv1d.initial_state(batch_size),
            self.Lambda.new_zeros(batch_size, self.d_inner, dtype=state_dtype(self.Lambda)),
            torch.zeros(batch_size, dtype=torch.bool, device=self.Lambda.device),
        )

    def forward(
        self, x: Float[Tensor, "b t d"], state: RGLRUState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], RGLRUState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        y = functional.gelu(self.linear_y(x), approximate="tanh")
        u, window = self.conv1d(self.linear_x(x), None if state is None else state.conv, timeline)
        dtype = state_dtype(self.Lambda)
        r = self._gate(u, self.recurrence_gate_weight, self.recurrence_gate_bias)
        i = self._gate(u, self.input_gate_weight, self.input_gate_bias)
        log_a = -_SHARPNESS * functional.softplus(self.Lambda.to(dtype)) * r
        root = (-torch.expm1(2 * log_a)).clamp(min=_TINY).sqrt()
        first, begun = _first_steps(x[..., 0], None if state is None else state.begun, timeline)
        # The first step needs no decay of 0: what stands before it is 0.
        h, final = scan(
            log_a.exp(),
            torch.where(first[..., None], 1, root) * i * u.to(dtype),
            None if state is None else state.h,
            start=timeline.start,
            valid=timeline.valid,
        )
        y = self.linear_out(h.to(y.dtype) * y)
        return zero_where_invalid(y, timeline.valid), RGLRUState(window, final, begun)

    def _gate(self, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return a gate for each channel, from the channels of its block."""
        blocks = torch.einsum("bthw,hwv->bthv", u.unflatten(-1, (self.n_heads, -1)), weight.to(u.dtype))
        dtype = state_dtype(bias)
        return (blocks.to(dtype) + bias.to(dtype)).sigmoid().flatten(-2)


def _first_steps(steps: Tensor, begun: Tensor | None, timeline: Timeline) -> tuple[Tensor, Tensor]:
    """Return before which steps ``[b t]`` none of their sequence has counted, and whether one of the last has.

    That is where as many steps of the row have counted as before the sequence's start. Of these, the one that counts is
    the first; what stands at the others means nothing.
    """
    _, start, valid = timeline
    counts = torch.ones_like(steps, dtype=torch.long) if valid is None else valid.long()
    total = counts.cumsum(1)
    # Before the first start: −1 for a sequence that has begun, so that no step is its first.
    origin = counts.new_zeros(counts.shape[0], 1) if begun is None else -begun.long()[:, None]
    here = torch.full_like(counts, -1) if start is None else torch.where(start, total - counts, -1)
    origin = torch.cat([origin, here], 1).cummax(1).values
    return total - counts == origin[:, 1:], counts.sum(1) > origin[:, -1]
