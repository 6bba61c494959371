"""The modes of diagonal layers: how the real parts of their eigenvalues are parameterised, and where they start."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from .._shapes import Tensor
from ..systems import diagonal_modes, legs_normal, perturbed_legs
from ._parts import softplus_inverse

PARAMETERIZATIONS = ("exp", "softplus", "direct", "stable")
INITIALIZATIONS = ("legs", "lin", "inv", "quad", "real", "dfout", "ptd")

# The curvature of "stable" at w = 0, where Re λ = −1/0.1 is as small as it gets.
_STABLE = 0.1


def real_part(w: Tensor, parameterization: str) -> Tensor:
    """Return Re λ from its parameter.

        exp       −e^w               softplus    −log(1 + e^w)
        direct    w                  stable      −1/(w² + 0.1)

    All but "direct" stay negative whatever an optimiser does. Under "stable", a step of w changes what the layer
    remembers by as much however long it remembers.

    Source:
        Wang and Li, arXiv:2311.14495.
    """
    if parameterization == "exp":
        return -w.exp()
    if parameterization == "softplus":
        return -softplus(w)
    return w if parameterization == "direct" else -1 / (w.square() + _STABLE)


def set_real_part_(w: nn.Parameter, values: np.ndarray, parameterization: str, where: str) -> None:
    """Give a parameter the values from which ``real_part`` returns the negative ones given, broadcast to it.

    Raises:
        ValueError: If a value is below what the parameterisation reaches.
    """
    x = -torch.from_numpy(np.ascontiguousarray(values)).double()
    if parameterization == "exp":
        inverse = x.log()
    elif parameterization == "softplus":
        inverse = softplus_inverse(x)
    elif parameterization == "direct":
        inverse = -x
    elif x.max() * _STABLE < 1:
        inverse = (1 / x - _STABLE).sqrt()
    else:
        raise ValueError(
            f"{where}(parameterization='stable'): the initial Re λ go down to {-x.max().item():.4g}, and this "
            f"parameterization reaches −10 only. Try parameterization='softplus'."
        )
    w.copy_(inverse.expand_as(w))


def initial_modes(initialization: str, d_state: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the initial diagonal A and B of one channel: half of the conjugate pairs, or all real modes.

    Those of "dfout" depend on Δ: ``circle_modes``.
    """
    half = d_state // 2
    n = np.arange(d_state if initialization == "real" else half, dtype=np.float64)
    if initialization == "legs":
        modes = diagonal_modes(*legs_normal(d_state))
        B = np.clip(modes.B.real, -2, 2) + 1j * np.clip(modes.B.imag, -2, 2)
        return modes.eigenvalues, B
    if initialization == "ptd":
        system = perturbed_legs(d_state)
        return system.eigenvalues, system.B
    frequencies = {
        "lin": np.pi * n,
        "inv": d_state / np.pi * (d_state / (2 * n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / np.pi,
        "real": 0 * n,
    }[initialization]
    real = -(n + 1) if initialization == "real" else np.full_like(n, -0.5)
    return real + 1j * frequencies, np.ones_like(n) + 0j


def circle_modes(dt: np.ndarray, d_state: int, discretization: str) -> np.ndarray:
    """Return initial diagonals A ``[d n]`` whose discrete poles are equally spaced on a circle for each step Δ (DFouT).

        Ā_hn = e^{−Δ_h/2 + iθ_hn},    θ_hn = 2πn/N + 2πh/(N d),    n = 0 … N/2 − 1,  h = 0 … d − 1

    The poles of the features interleave: together they are equally spaced too, whatever their Δ. One of each conjugate
    pair is kept.

    Source:
        arXiv:2508.20441.
    """
    dt = dt[:, None]
    n, h = np.arange(d_state // 2), np.arange(len(dt))[:, None]
    z = -dt / 2 + 2j * np.pi / d_state * (n + h / len(dt))
    if discretization == "bilinear":  # that rule puts a pole at (1 + z/2)/(1 − z/2)
        z = 2 * np.tanh(z / 2)
    return np.asarray(z / dt)
