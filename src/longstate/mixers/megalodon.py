"""Megalodon: Mega with a complex moving average, statistics that run along time, and normalised attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

from .._shapes import Float, Inexact, Int, Tensor
from ..ops import scan
from ..timeline import Timeline, segments, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._diagonal import run_modes
from ._parts import Linear
from .attention import AttentionState, Reading, WindowState, empty_cache
from .mega import check_chunk


class NormState(NamedTuple):
    """How many steps of a sequence have counted, and mean and variance of each group of channels over them."""

    steps: Int[Tensor, " b"]
    mean: Float[Tensor, "b g"]
    variance: Float[Tensor, "b g"]


class MegalodonState(NamedTuple):
    """What the norm, the moving average and the attention remember."""

    norm: NormState
    ssm: Inexact[Tensor, "b d n"]
    attention: AttentionState | WindowState


class TimestepNorm(nn.Module):
    """Norm each group of channels by its mean and variance over all steps so far.

        μ_t = μ_{t−1} + (m_t − μ_{t−1}) / t,    σ²_t = σ²_{t−1} + (v_t + (m_t − μ_{t−1})(m_t − μ_t) − σ²_{t−1}) / t
        y_t = weight ∘ (x_t − μ_t) / √(σ²_t + eps) + bias

    with m_t and v_t the mean and the variance of the group's channels at step t. Both lines are linear recurrences, and
    are scanned; no sum of squares is ever taken from another.

    Args:
        width: Channels.
        groups: Groups of channels that are normed apart.
        eps: Added to the variance.

    Raises:
        ValueError: If the width does not divide into groups, or ε is not positive.
    """

    def __init__(self, width: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"TimestepNorm(width={width}, groups={groups}): the width is not a multiple of groups")
        if not eps > 0:
            raise ValueError(f"TimestepNorm(eps={eps}): wanted a small positive number, such as 1e-5")
        self.groups, self.eps = groups, eps
        self.weight = mark(nn.Parameter(torch.empty(width)))
        self.bias = mark(nn.Parameter(torch.empty(width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights to 1 and biases to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def initial_state(self, batch_size: int) -> NormState:
        """Return that no step has counted."""
        zeros = self.weight.new_zeros(batch_size, self.groups, dtype=state_dtype(self.weight))
        return NormState(torch.zeros(batch_size, dtype=torch.long, device=zeros.device), zeros, zeros.clone())

    def forward(self, x: Tensor, state: NormState | None, timeline: Timeline) -> tuple[Tensor, NormState]:
        """Return the normed steps, and the statistics after the last one."""
        dtype = state_dtype(self.weight)
        before = self.initial_state(x.shape[0]) if state is None else state
        count, last = _counted(x, before.steps, timeline)
        u = x.to(dtype).unflatten(-1, (self.groups, -1))
        m = u.mean(-1)
        v = (u - m[..., None]).square().mean(-1)
        n = count.clamp(min=1).to(dtype)[..., None]
        keep = ((n - 1) / n).expand_as(m)
        _, start, valid = timeline
        mean, final_mean = scan(keep, m / n, before.mean, start=start, valid=valid)
        # m − μ_{t−1} = (m − μ_t) · t/(t − 1), and the first step has no spread about its own mean.
        spread = (m - mean).square() * torch.where(n > 1, n / (n - 1).clamp(min=1), 0)
        v = (v + spread) / n
        variance, final_variance = scan(keep, v, before.variance, start=start, valid=valid)
        y = (u - mean[..., None]) * torch.rsqrt(variance + self.eps)[..., None]
        y = y.flatten(-2) * self.weight.to(dtype) + self.bias.to(dtype)
        return zero_where_invalid(y.to(x.dtype), timeline.valid), NormState(last, final_mean, final_variance)


class CEMA(nn.Module):
    """Average each channel with several decays and turning phases, and sum the averages with a skip.

        h_{t,j} = q_j h_{t−1,j} + p_j x_t,    y_t = Re Σ_j η_j h_{t,j} / √n + ω x_t
        p = σ(α),    q_j = (1 − p σ(δ)) e^{iθ_j},    θ_j = 2π j σ(θ) / n,    j = 1 … n

    Args:
        width: Channels.
        d_state: Averages of a channel.

    Raises:
        ValueError: If there is no average.
    """

    def __init__(self, width: int, d_state: int) -> None:
        super().__init__()
        if d_state < 1:
            raise ValueError(f"CEMA(d_state={d_state}): wanted at least one average of a channel, such as 16")
        self.alpha = mark(nn.Parameter(torch.empty(width, d_state)))
        self.delta = mark(nn.Parameter(torch.empty(width, d_state)))
        self.theta = mark(nn.Parameter(torch.empty(width)))
        self.eta = mark(nn.Parameter(torch.empty(width, d_state, 2)))  # complex numbers as pairs
        self.omega = mark(nn.Parameter(torch.empty(width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rates, dampings and outputs from normal distributions, and phases that differ between channels."""
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.theta)
        nn.init.normal_(self.eta, std=math.sqrt(0.5))
        nn.init.normal_(self.omega)

    def forward(self, x: Tensor, state: Tensor | None, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """Return the sums and the averages after the last step, both in float32 (complex64) at least."""
        dtype, n = state_dtype(self.alpha), self.alpha.shape[1]
        rate = self.alpha.to(dtype).sigmoid()
        # The logarithm of the decay in float64: a phase of thousands of radians has few digits left in float32.
        decay = torch.log1p(-(rate * self.delta.to(dtype).sigmoid()).double())
        turn = torch.arange(1, n + 1, dtype=torch.float64, device=rate.device) * (2 * math.pi / n)
        phase = self.theta.to(dtype).sigmoid().double()[:, None] * turn
        # Modes stand for pairs in the op, whose output is 2 Re: half of it is what is wanted.
        eta = torch.view_as_complex(self.eta.to(dtype)) / (2 * math.sqrt(n))
        u, B = x.to(dtype), torch.complex(rate, torch.zeros_like(rate))
        y, final = run_modes(u, torch.complex(decay, phase), B, eta, state, timeline)
        return y + self.omega.to(dtype) * u, final


class Megalodon(Mixer):
    """Norm by running statistics, average with turning phases, attend over the averages, and gate the result.

        u = TimestepNorm(x),    x′ = CEMA(u),    z = W_z x′ normalised to length 1 in each head,    v = SiLU(W_v u)
        q = κ_q ∘ z + μ_q,    k = κ_k ∘ z + μ_k, both rotated by the position
        o_t = Σ_s softmax_s(q_tᵀ k_s) v_s    over the past, or over its part in the same chunk
        y = W_h x′ + U_h (SiLU(W_γ x′) ∘ o)

    The sum with the layer's input is left to the model. Biases of the projections are left out above.

    Args:
        d_model: Channels.
        d_state: Averages of a channel.
        d_key: Channels of queries and keys, all heads together.
        d_value: Channels of values; 2·d_model when absent.
        n_heads: Heads of the attention.
        chunk: Steps of a chunk, which attends to itself only; all of the past when absent.
        norm_groups: Groups of channels with statistics of their own; of several channels each.
        norm_eps: Added to their variances.
        rotary_base: The longest wavelength of the rotation is about 2π times this.

    Raises:
        ValueError: If the sizes do not go together; in ``forward``, if the timeline has ``dt``: averages count steps.

    Source:
        Ma et al., arXiv:2404.08801, section 3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_key: int = 64,
        d_value: int | None = None,
        n_heads: int = 1,
        chunk: int | None = None,
        norm_groups: int = 1,
        norm_eps: float = 1e-5,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__()
        check_chunk("Megalodon", chunk)
        d_value = 2 * d_model if d_value is None else d_value
        if n_heads < 1 or d_key % (2 * n_heads) or d_key < 2 or d_value % n_heads or d_value < 1:
            raise ValueError(
                f"Megalodon(d_key={d_key}, d_value={d_value}, n_heads={n_heads}): heads need an even number of channels"
                f" of keys each, and alike many of values. Try d_key={2 * max(1, n_heads) * max(1, d_key // 2)}."
            )
        self.d_model, self.d_state, self.d_key, self.d_value = d_model, d_state, d_key, d_value
        self.n_heads, self.chunk, self.rotary_base = n_heads, chunk, rotary_base
        self.norm = TimestepNorm(d_model, norm_groups, norm_eps)
        self.cema = CEMA(d_model, d_state)
        self.v_proj = Linear(d_model, d_value)
        self.mx_proj = Linear(d_model, d_key + d_value + d_model)  # z, γ and the sum's first part
        self.h_proj = Linear(d_value, d_model, bias=False)
        self.scale = mark(nn.Parameter(torch.empty(2, d_key)))
        self.shift = mark(nn.Parameter(torch.empty(2, d_key)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the averages and the projections, and scales of scores about 1."""
        for module in (self.norm, self.cema, self.v_proj, self.mx_proj, self.h_proj):
            module.reset_parameters()
        nn.init.normal_(self.scale, mean=1.0, std=0.02)
        nn.init.zeros_(self.shift)

    def initial_state(self, batch_size: int) -> MegalodonState:
        """Return that nothing has been read or averaged."""
        dtype = state_dtype(self.scale).to_complex()
        slots, weight = self.chunk or 0, self.v_proj.weight
        keys = (batch_size, slots, self.n_heads, self.d_key // self.n_heads)
        values = (batch_size, slots, self.n_heads, self.d_value // self.n_heads)
        ssm = torch.zeros(batch_size, self.d_model, self.d_state, dtype=dtype, device=weight.device)
        return MegalodonState(self.norm.initial_state(batch_size), ssm, empty_cache(weight, keys, values, self.chunk))

    def forward(
        self, x: Float[Tensor, "b t d"], state: MegalodonState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], MegalodonState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        if x.shape[1] == 0:
            return x.clone(), state or self.initial_state(x.shape[0])
        statistics, averages, cache = (None, None, None) if state is None else state
        u, statistics = self.norm(x, statistics, timeline)
        averaged, final = self.cema(u, averages, timeline)
        averaged = averaged.to(x.dtype)
        v = silu(self.v_proj(u)).unflatten(-1, (self.n_heads, -1))
        z, gate, candidate = self.mx_proj(averaged).split([self.d_key, self.d_value, self.d_model], -1)
        # In float32 at least, and with room below the root: a step of zeros has a direction of zeros.
        z = z.to(state_dtype(self.scale)).unflatten(-1, (self.n_heads, -1))
        z = (z * torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-12)).flatten(-2)
        q, k = (z[..., None, :] * self.scale + self.shift).to(x.dtype).unflatten(-1, (self.n_heads, -1)).unbind(2)
        reading = Reading(self.chunk, True, self.d_key // self.n_heads, self.rotary_base, 1.0)
        o, cache = reading(q, k, v, cache, timeline)
        y = candidate + self.h_proj(silu(gate) * o.flatten(-2))
        return zero_where_invalid(y, timeline.valid), MegalodonState(statistics, final, cache)


def _counted(x: Tensor, before: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
    """Return how many steps of its sequence have counted up to each step ``[b t]``, and up to the end of the last."""
    _, start, valid = timeline
    counts = torch.ones_like(x[..., 0], dtype=torch.long) if valid is None else valid.long()
    total = counts.cumsum(1) + before[:, None]
    if start is None:
        return total, total[:, -1].clone()
    # What had been counted when the last sequence to begin did; totals never fall, so the largest is the latest.
    origin = torch.where(start, total - counts, 0).cummax(1).values
    origin = origin.masked_fill(segments(start) == 0, 0)
    total = total - origin
    return total, total[:, -1].clone()
