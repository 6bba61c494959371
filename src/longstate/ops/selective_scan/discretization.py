"""From Δ and A to the coefficients of one step, with their derivatives.

Every rule is h ← decay(z) h + Δ φ(z) B u with z = ΔA. Each function works on real and complex tensors.

    rule        decay(z)                 φ(z)                 used by
    zoh-euler   e^z                      1                    Mamba: exact decay, Euler input (arXiv:2312.00752, 3.1)
    zoh         e^z                      (e^z − 1)/z          S4D, S5 (arXiv:2206.11893)
    bilinear    (1 + z/2)/(1 − z/2)      1/(1 − z/2)          S4D, S5 (Tustin)
"""

from __future__ import annotations

import math

import torch

from ..._shapes import Tensor

RULES = ("zoh-euler", "zoh", "bilinear")


def coefficients(z: Tensor, rule: str) -> tuple[Tensor, Tensor | None]:
    """Return decay(z) and φ(z); ``None`` stands for a φ of 1."""
    if rule == "zoh-euler":
        return z.exp(), None
    if rule == "zoh":
        return z.exp(), phi(z)
    half = z / 2
    gain = 1 / (1 - half)
    return (1 + half) * gain, gain


def derivatives(z: Tensor, rule: str) -> tuple[Tensor, Tensor | None]:
    """Return decay′(z) and φ′(z); ``None`` stands for 0."""
    if rule == "zoh-euler":
        return z.exp(), None
    if rule == "zoh":
        return z.exp(), _phi_slope(z)
    square = (1 - z / 2) ** -2
    return square, square / 2


def phi(z: Tensor) -> Tensor:
    """Return (e^z − 1)/z by ``expm1``, with its limit 1 at z = 0."""
    zero = z == 0
    return torch.where(zero, 1, torch.expm1(z) / torch.where(zero, 1, z))


def _phi_slope(z: Tensor) -> Tensor:
    """Return φ′(z) = (e^z − φ(z))/z, by its series Σ z^k / (k! (k + 2)) near 0 where the difference cancels."""
    near = z.abs() < 0.5
    small = torch.where(near, z, 0)
    series = torch.zeros_like(z)
    for k in range(14, -1, -1):  # 0.5^15 / 15! / 17 < 2e-18
        series = series * small + 1 / (math.factorial(k) * (k + 2))
    away = torch.where(near, 1, z)
    return torch.where(near, series, (away.exp() - phi(away)) / away)
