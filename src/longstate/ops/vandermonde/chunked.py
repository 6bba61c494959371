"""The kernel of a diagonal system as a product of matrices, in double precision.

Powers factor: e^{(ci+j)z} = e^{ciz} e^{jz}, so that no tensor holds more than √length powers of each base.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from ..._shapes import Tensor


def powers(log_base: Tensor, count: int) -> Tensor:
    """Return e^{jz} for j below ``count``, ``[… n j]``, each by at most log₂ j products of others."""
    result, factor = torch.ones_like(log_base)[..., None], log_base.exp()[..., None]
    while result.shape[-1] < count:
        result = torch.cat([result, result * factor], -1)
        factor = factor * factor
    return result[..., :count]


def factors(log_base: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return e^{ciz} ``[… n i]`` and e^{jz} ``[… n j]``, so many that their products are at least ``length`` powers."""
    columns = math.isqrt(max(length - 1, 0)) + 1
    return powers(columns * log_base, -(-length // columns)), powers(log_base, columns)


def vandermonde(weights: Tensor, log_base: Tensor, length: int) -> Tensor:
    """Return the kernel ``[… l]`` in the precision of the weights."""
    coarse, fine = factors(log_base, length)
    left = weights[..., None] * coarse
    if weights.is_complex():
        left = 2 * torch.cat([left.real, -left.imag], -2)
        fine = torch.cat([fine.real, fine.imag], -2)
    return (left.mT @ fine).flatten(-2)[..., :length].to(weights.real.dtype)


def vandermonde_backward(grad: Tensor, weights: Tensor, log_base: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weights and bases: 2 Σ_l g_l ē_l and 2 w̄ Σ_l g_l l ē_l with e_l = e^{lz}, half as much of
    real numbers."""
    coarse, fine = factors(log_base, grad.shape[-1])
    rows, columns = coarse.shape[-1], fine.shape[-1]
    g = pad(grad.to(torch.float64), (0, rows * columns - grad.shape[-1])).unflatten(-1, (rows, columns))
    count = torch.arange(max(rows, columns), dtype=torch.float64, device=grad.device)
    of_parts = torch.cat([fine.real, fine.imag], -2) if fine.is_complex() else fine
    zeroth, first = (x @ of_parts.mT for x in (g, g * count[:columns]))
    if fine.is_complex():
        zeroth, first = (2 * torch.complex(*x.chunk(2, -1)) for x in (zeroth, first))
    first = first + (columns * count[:rows])[:, None] * zeroth
    grad_weights, grad_log_base = ((coarse * x.mT).sum(-1) for x in (zeroth, first))
    grad_log_base = weights * grad_log_base
    return grad_weights.conj().resolve_conj().to(weights.dtype), grad_log_base.conj().resolve_conj()
