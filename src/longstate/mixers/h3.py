"""H3: a shift and a diagonal state space model between two multiplications."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from .._shapes import Float, Inexact, Tensor
from ..ops.selective_scan.discretization import phi
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._diagonal import run_modes
from ._parts import Linear, ShortConvolution, check_steps, log_uniform_


class H3State(NamedTuple):
    """The last keys, and the modes of each head's outer products of keys and values."""

    conv: Float[Tensor, "b window d"]
    ssm: Inexact[Tensor, "b k p h n"]


class H3(Mixer):
    """Remember outer products of shifted keys and values by a diagonal system, and read them with queries.

        k̄ = conv(W_k u),    S_t = SSM(k̄_t v_tᵀ),    y_t = W_o S_tᵀ q_t
        SSM: x′ = diag(A) x + u,    y = 2 Re(Cᵀ x) + D u    sampled with a step Δ

    Each head has a system of its own, which all entries of its outer product run through. The shift system is a causal
    convolution: its state is the last inputs. Outer products make d_model · head_dim numbers at each step.

    Args:
        d_model: Channels.
        d_state: Real states of a head's system; of each conjugate pair of modes one is kept.
        head_dim: Channels of a head.
        d_conv: States of the shift system: taps of its convolution.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.

    Raises:
        ValueError: If the sizes do not go together; in ``forward``, if the timeline has ``dt``: the shift counts steps.

    Source:
        Fu et al., arXiv:2212.14052, section 3 and algorithm 1; modes as S4D-Lin, arXiv:2206.11893.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        d_conv: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise ValueError(f"H3(d_state={d_state}): modes come in conjugate pairs. Try {max(2, d_state + 1)}.")
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(
                f"H3(d_model={d_model}, head_dim={head_dim}): d_model is not a multiple of head_dim. Choose a divisor."
            )
        check_steps("H3", dt_min, dt_max)
        self.d_model, self.d_state, self.head_dim, self.n_heads = d_model, d_state, head_dim, d_model // head_dim
        self.dt_min, self.dt_max = dt_min, dt_max
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.conv1d = ShortConvolution(d_model, d_conv, bias=False, activation=None)
        self.log_A_real = mark(nn.Parameter(torch.empty(self.n_heads, d_state // 2)), 1e-3)
        self.A_imag = mark(nn.Parameter(torch.empty(self.n_heads, d_state // 2)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(self.n_heads, d_state // 2, 2)))
        self.D = mark(nn.Parameter(torch.empty(self.n_heads)))
        self.log_dt = mark(nn.Parameter(torch.empty(self.n_heads)), 1e-3)
        self.o_proj = Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the modes, and draw Δ, C, D, the taps and the projections."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.conv1d, self.o_proj):
            module.reset_parameters()
        nn.init.constant_(self.log_A_real, math.log(0.5))
        with torch.no_grad():
            self.A_imag.copy_(math.pi * torch.arange(self.d_state // 2).expand_as(self.A_imag))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)
        log_uniform_(self.log_dt, self.dt_min, self.dt_max)

    def initial_state(self, batch_size: int) -> H3State:
        """Return zeros."""
        shape = (batch_size, self.head_dim, self.head_dim, *self.A_imag.shape)
        dtype = state_dtype(self.C).to_complex()
        return H3State(self.conv1d.initial_state(batch_size), torch.zeros(shape, dtype=dtype, device=self.C.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: H3State | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], H3State]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        window, before = (None, None) if state is None else state
        k, window = self.conv1d(self.k_proj(x), window, timeline)
        dtype = state_dtype(self.C)
        q, k, v = (z.to(dtype).unflatten(-1, (-1, self.head_dim)) for z in (self.q_proj(x), k, self.v_proj(x)))
        # Entries of the outer products run beside each other, as sequences of a larger batch with heads for channels.
        written = torch.einsum("bthk,bthp->bkpth", k, v)
        log_decay, B, C = self.system()
        copies = self.head_dim**2
        start, valid = (None if flag is None else flag.repeat_interleave(copies, 0) for flag in timeline[1:])
        before = None if before is None else before.flatten(0, 2)
        read, final = run_modes(written.flatten(0, 2), log_decay, B, C, before, Timeline(None, start, valid))
        read = read.unflatten(0, written.shape[:3])
        y = torch.einsum("bkpth,bthk->bthp", read, q) + (self.D.to(dtype)[:, None] * (q * k).sum(-1, keepdim=True)) * v
        y = self.o_proj(y.flatten(-2).to(x.dtype))
        return zero_where_invalid(y, timeline.valid), H3State(window, final.unflatten(0, written.shape[:3]))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Ā (in double precision), B̄ and C ``[h n]`` of the heads' systems, by zero-order hold."""
        dtype = state_dtype(self.C)
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        dt = self.log_dt.to(dtype).exp()[:, None]
        log_decay = (dt * A).to(torch.complex128)
        return log_decay, dt * phi(dt * A), torch.view_as_complex(self.C.to(dtype))
