"""Mega: an exponential moving average with several rates a channel, and a gated attention that reads it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

from .._shapes import Float, Tensor
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._diagonal import run_modes
from ._parts import Linear
from .attention import AttentionState, Reading, WindowState, empty_cache


class MegaState(NamedTuple):
    """The averages of every channel, and what the attention remembers."""

    ssm: Float[Tensor, "b d n"]
    attention: AttentionState | WindowState


class EMA(nn.Module):
    """Average each channel with several rates, damped, and sum the averages with a skip.

        h_{t,j} = q_j h_{t−1,j} + p_j β_j x_t,    y_t = Σ_j η_j h_{t,j} / √n + ω x_t;    p = σ(α), q = 1 − p σ(δ)

    Args:
        width: Channels.
        d_state: Averages of a channel.

    Raises:
        ValueError: If there is no average.
    """

    def __init__(self, width: int, d_state: int) -> None:
        super().__init__()
        if d_state < 1:
            raise ValueError(f"EMA(d_state={d_state}): wanted at least one average of a channel, such as 16")
        self.alpha = mark(nn.Parameter(torch.empty(width, d_state)))
        self.delta = mark(nn.Parameter(torch.empty(width, d_state)))
        self.beta = mark(nn.Parameter(torch.empty(width, d_state)))
        self.eta = mark(nn.Parameter(torch.empty(width, d_state)))
        self.omega = mark(nn.Parameter(torch.empty(width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rates, dampings and outputs from normal distributions, and inputs of alternating sign."""
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.eta)
        nn.init.normal_(self.omega)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            # Alternating signs, so that averages with rates that begin alike are not one average.
            sign = 1 - 2 * (torch.arange(self.beta.shape[1], device=self.beta.device) % 2)
            self.beta.add_(sign.to(self.beta.dtype))

    def forward(self, x: Tensor, state: Tensor | None, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """Return the sums and the averages after the last step, both in float32 at least."""
        dtype = state_dtype(self.alpha)
        alpha, delta, beta, eta = (p.to(dtype) for p in (self.alpha, self.delta, self.beta, self.eta))
        rate = alpha.sigmoid()
        log_decay = torch.log1p(-(rate * delta.sigmoid()).double())
        u, eta = x.to(dtype), eta / math.sqrt(self.alpha.shape[1])
        y, final = run_modes(u, log_decay, rate * beta, eta, state, timeline)
        return y + self.omega.to(dtype) * u, final


class Mega(Mixer):
    """Average the past with several rates a channel, attend over what the averages say, and gate the result.

        x′ = SiLU(EMA(x)),    z = SiLU(W_z x′),    v = SiLU(W_v x)
        q = (κ_q ∘ z + μ_q) / √d_key,    k = κ_k ∘ z + μ_k
        o_t = Σ_s softmax_s(q_tᵀ k_s + (R_t a)ᵀ (R_s b)) v_s    over the past, or over its part in the same chunk
        γ = SiLU(W_γ x′),    φ = σ(W_φ x′),    y = φ ∘ SiLU(W_h x′ + U_h (γ ∘ o)) + (1 − φ) ∘ x

    R_t rotates by the position t, so that the bias of a score depends on the distance alone. Biases of the
    projections are left out above.

    Args:
        d_model: Channels.
        d_state: Averages of a channel.
        d_key: Channels of queries and keys, even.
        d_value: Channels of values; 2·d_model when absent.
        chunk: Steps of a chunk, which attends to itself only; all of the past when absent.
        rotary_base: The longest wavelength of the bias is about 2π times this.

    Raises:
        ValueError: If the sizes do not go together; in ``forward``, if the timeline has ``dt``: averages count steps.

    Source:
        Ma et al., arXiv:2209.10655, equations 7–17, with softmax; the bias is the rotary one of its appendix.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_key: int = 64,
        d_value: int | None = None,
        chunk: int | None = None,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__()
        check_chunk("Mega", chunk)
        if d_key < 2 or d_key % 2:
            raise ValueError(f"Mega(d_key={d_key}): positions rotate pairs of channels. Try d_key={max(2, d_key + 1)}.")
        d_value = 2 * d_model if d_value is None else d_value
        self.d_model, self.d_state, self.d_key, self.d_value = d_model, d_state, d_key, d_value
        self.chunk, self.rotary_base = chunk, rotary_base
        self.ema = EMA(d_model, d_state)
        self.v_proj = Linear(d_model, d_value)
        self.mx_proj = Linear(d_model, d_key + d_value + 2 * d_model)  # z, γ, φ and the candidate
        self.h_proj = Linear(d_value, d_model, bias=False)
        self.scale = mark(nn.Parameter(torch.empty(2, d_key)))
        self.shift = mark(nn.Parameter(torch.empty(2, d_key)))
        self.bias = mark(nn.Parameter(torch.empty(2, d_key)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the averages, the projections, and small scales and biases of scores."""
        for module in (self.ema, self.v_proj, self.mx_proj, self.h_proj):
            module.reset_parameters()
        nn.init.normal_(self.scale, std=0.02)
        nn.init.zeros_(self.shift)
        nn.init.normal_(self.bias, std=0.02)

    def initial_state(self, batch_size: int) -> MegaState:
        """Return averages of zero, and that nothing has been read."""
        slots = self.chunk or 0
        weight, dtype = self.v_proj.weight, state_dtype(self.scale)
        keys, values = (batch_size, slots, 1, 2 * self.d_key), (batch_size, slots, 1, self.d_value)
        ssm = self.scale.new_zeros(batch_size, self.d_model, self.d_state, dtype=dtype)
        return MegaState(ssm, empty_cache(weight, keys, values, self.chunk))

    def forward(
        self, x: Float[Tensor, "b t d"], state: MegaState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], MegaState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        if x.shape[1] == 0:
            return x.clone(), state or self.initial_state(x.shape[0])
        averages, cache = (None, None) if state is None else state
        averaged, final = self.ema(x, averages, timeline)
        averaged = silu(averaged).to(x.dtype)
        v = silu(self.v_proj(x))
        mixed = self.mx_proj(averaged)
        z, gate, update, candidate = mixed.split([self.d_key, self.d_value, self.d_model, self.d_model], -1)
        q, k = (silu(z)[..., None, :] * self.scale + self.shift).unbind(-2)
        # Channels that are the same at every step until they are rotated make the bias of the distance.
        a, b = (p.expand_as(q) for p in self.bias)
        q, k = torch.cat([a, q / math.sqrt(self.d_key)], -1), torch.cat([b, k], -1)
        reading = Reading(self.chunk, True, self.d_key, self.rotary_base, 1.0)
        o, cache = reading(q[:, :, None], k[:, :, None], v[:, :, None], cache, timeline)
        candidate = silu(candidate + self.h_proj(silu(gate) * o.flatten(-2)))
        y = torch.lerp(x, candidate, update.sigmoid())
        return zero_where_invalid(y, timeline.valid), MegaState(final, cache)


def check_chunk(name: str, chunk: int | None) -> None:
    """Check the length of a chunk.

    Raises:
        ValueError: If no step fits.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(
            f"{name}(chunk={chunk}): a chunk has at least one step. Take 1 or more, or None for no chunks."
        )
