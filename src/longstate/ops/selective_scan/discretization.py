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
        return _exponentials(z)[0], None
    if rule == "zoh":
        decay, less_one = _exponentials(z)
        return decay, _over(less_one, z)
    half = z / 2
    gain = 1 / (1 - half)
    return (1 + half) * gain, gain


def derivatives(z: Tensor, rule: str, decay: Tensor, phi: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return decay′(z) and φ′(z), from decay(z) and φ(z); ``None`` stands for 0."""
    if phi is None:
        return decay, None
    if rule == "zoh":
        return decay, _phi_slope(z, decay, phi)
    square = phi * phi
    return square, square / 2


def phi(z: Tensor) -> Tensor:
    """Return (e^z − 1)/z by ``expm1``, with its limit 1 at z = 0."""
    return _over(_exponentials(z)[1], z)


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^z and e^z − 1. Of complex numbers by functions of real ones, which are ten times as fast in PyTorch."""
    if not z.is_complex():
        return z.exp(), torch.expm1(z)
    real, imaginary = z.real.contiguous(), z.imag.contiguous()
    # e^x cos y − 1 = (e^x − 1) cos y − 2 sin² (y/2) loses no digits near z = 0.
    cosine, half = imaginary.cos(), (imaginary / 2).sin()
    size, turned = real.exp(), imaginary.sin()
    upward = size * turned
    less_one = torch.expm1(real) * cosine - 2 * half * half
    return torch.complex(size * cosine, upward), torch.complex(less_one, upward)


def _over(less_one: Tensor, z: Tensor) -> Tensor:
    zero = z == 0
    return torch.where(zero, 1, less_one / torch.where(zero, 1, z))


def _phi_slope(z: Tensor, decay: Tensor, phi: Tensor) -> Tensor:
    """Return φ′(z) = (e^z − φ(z))/z, by its series Σ z^k / (k! (k + 2)) near 0 where the difference cancels."""
    near = z.abs() < 0.5
    small = torch.where(near, z, 0)
    terms = 9 if z.dtype in (torch.float32, torch.complex64) else 15
    series = torch.zeros_like(z)
    for k in range(terms - 1, -1, -1):  # 0.5^9 / 9! / 11 < 5e-10, and 0.5^15 / 15! / 17 < 2e-18
        series = series * small + 1 / (math.factorial(k) * (k + 2))
    return torch.where(near, series, (decay - phi) / torch.where(near, 1, z))
