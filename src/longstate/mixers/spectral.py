"""STU: features by fixed spectral filters, and a recurrence over past outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import matrix_scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._implicit import convolve_bank
from ._parts import OutputGate

DELAY = 2  # steps between an input and the first of its spectral features


class STUState(NamedTuple):
    """The last inputs, as many as the filters see, and the last outputs of the recurrence."""

    window: Float[Tensor, "b window d"]
    h: Float[Tensor, "b k d"]


class STU(Mixer):
    """Filter inputs by fixed spectral filters, and mix the features and the past outputs by learned matrices.

        y_t = Σ_{i≤k_y} M^y_i y_{t−i} + Σ_{i<k_u} M^u_i u_{t−i} + Σ_k (M⁺_k U⁺_{t−2,k} + M⁻_k U⁻_{t−2,k})
        U^±_{t,k} = σ_k^{1/4} Σ_{i<l} (±1)^i φ_k(i) u_{t−i}

    φ_k are the first eigenvectors, σ_k the eigenvalues, of the Hankel matrix of ``spectral_filters``. Features of
    sequences of l steps approximate any linear system with real modes, however slowly it forgets, with an error that
    falls exponentially in the number of filters. Further back than l steps only past outputs reach; nothing keeps their
    recurrence stable in training but small steps. Every channel goes through every filter. For a row of several
    sequences that takes the memory of 2 n_filters + k_u times the row and its window.

    Args:
        d_model: Channels.
        length: l, taps of the filters.
        n_filters: Filters of each sign.
        k_u: Inputs that are mixed directly.
        k_y: Past outputs that are.
        alpha: What M^y of the second past output (the first where there is one only) begins with, times the identity;
            the other ones begin at 0.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If sizes make no sense, or there are more filters than double precision tells from each other; in
            ``forward``, if the timeline has ``dt``: taps count steps.

    Source:
        Agarwal et al., arXiv:2312.06837.
    """

    def __init__(
        self,
        d_model: int,
        length: int = 1024,
        n_filters: int = 24,
        k_u: int = 3,
        k_y: int = 2,
        alpha: float = 0.9,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("STU", "output", output, ("glu", "identity"))
        if min(k_u, k_y) < 1 or not 0 <= alpha <= 1:
            raise ValueError(
                f"STU(k_u={k_u}, k_y={k_y}, alpha={alpha}): wanted at least 1 input and 1 output, such as 3 and 2, and"
                " an alpha from 0 to 1, such as 0.9"
            )
        self.d_model, self.length, self.n_filters = d_model, length, n_filters
        self.k_u, self.k_y, self.alpha = k_u, k_y, alpha
        # No buffer: in whatever type the parameters are, filters keep all their digits.
        self.taps = torch.from_numpy(_bank(length, n_filters, k_u))
        self.M_u = nn.Parameter(torch.empty(k_u, d_model, d_model))
        self.M_y = mark(nn.Parameter(torch.empty(k_y, d_model, d_model)))
        self.M_phi = nn.Parameter(torch.empty(2 * n_filters, d_model, d_model))
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw M^u, and begin without spectral features."""
        nn.init.normal_(self.M_u, std=1 / math.sqrt(self.k_u * self.d_model))
        nn.init.zeros_(self.M_phi)
        nn.init.zeros_(self.M_y)
        with torch.no_grad():
            self.M_y[min(1, self.k_y - 1)].fill_diagonal_(self.alpha)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> STUState:
        """Return zeros."""
        window = self.M_u.new_zeros(batch_size, self.taps.shape[1] - 1, self.d_model)
        return STUState(window, self.M_y.new_zeros(batch_size, *self.M_y.shape[:2], dtype=state_dtype(self.M_y)))

    def forward(
        self, x: Float[Tensor, "b t d"], state: STUState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], STUState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        dtype, width = state_dtype(self.M_u), self.d_model
        before = None if state is None else state.window.to(dtype)
        mixing = torch.cat([self.M_u, self.M_phi]).to(dtype)
        driven, window = convolve_bank(x.to(dtype), self.taps.to(x.device, dtype), mixing, before, timeline)
        # Past outputs in one vector, the last one first: a companion matrix moves them on.
        shift = torch.eye(self.k_y * width, dtype=dtype, device=x.device)[: (self.k_y - 1) * width]
        A = torch.cat([self.M_y.to(dtype).transpose(0, 1).flatten(1), shift])
        h = None if state is None else state.h.flatten(1)
        driven = pad(driven, (0, (self.k_y - 1) * width))
        outputs, h = matrix_scan(A, driven, h, start=timeline.start, valid=timeline.valid)
        y = self.output(outputs[..., :width].to(x.dtype))
        final = STUState(window.to(x.dtype), h.unflatten(1, (self.k_y, width)))
        return zero_where_invalid(y, timeline.valid), final

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.M_u.is_meta:
            self.taps = self.taps.to(self.M_u.device)
        return self


def spectral_filters(length: int, count: int) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k l"]]:
    """Return the largest eigenvalues σ and the eigenvectors φ of a Hankel matrix, the largest tap of each positive.

        Z_ij = 2 / ((i+j)³ − (i+j)) = ∫ (1−α)² α^{i+j−2} dα over [0, 1],    i, j = 1 … length

    Eigenvalues fall exponentially, so that in double precision about 20 at 256 taps would be left of Z. But Z is F Fᵀ
    with F_is = √w_s (1−α_s) α_s^{i−1}, where nodes and weights are those of the trapezoidal rule for log(−log α), whose
    error is below 1e-30. Singular values of F are the roots of those of Z, and have twice the digits.

    Args:
        length: l.
        count: Eigenvectors.

    Raises:
        ValueError: If double precision does not tell as many from each other: σ must be above 1e-24 of the first.

    Source:
        Agarwal et al., arXiv:2312.06837.
    """
    if length < 1 or count < 1:
        raise ValueError(f"STU(length={length}, n_filters={count}): wanted at least 1 of each, such as 1024 and 24")
    step = 0.125
    rate = np.exp(np.arange(-27, 5.5, step))  # −log α
    F = np.sqrt(step * rate) * -np.expm1(-rate) * np.exp(-np.outer(np.arange(length) + 0.5, rate))
    vectors, roots, _ = np.linalg.svd(F, full_matrices=False)
    clear = int((roots > 1e-12 * roots[0]).sum())
    if count > clear:
        raise ValueError(
            f"STU(length={length}, n_filters={count}): of filters of {length} taps double precision tells {clear} from"
            f" each other. Try n_filters={clear}, or more taps."
        )
    phi = vectors.T[:count]
    largest = np.take_along_axis(phi, np.abs(phi).argmax(1)[:, None], 1)
    return roots[:count] ** 2, phi * np.sign(largest)


def _bank(length: int, count: int, k_u: int) -> Float[np.ndarray, "k l"]:
    """Return all that is convolved with: k_u single taps, then the delayed filters of each sign."""
    sigma, phi = spectral_filters(length, count)
    phi = sigma[:, None] ** 0.25 * phi
    signed = np.concatenate([phi, phi * (-1.0) ** np.arange(length)])
    taps = np.zeros((k_u + 2 * count, max(k_u, length + DELAY)))
    taps[:k_u, :k_u] = np.eye(k_u)
    taps[k_u:, DELAY : DELAY + length] = signed
    return taps
