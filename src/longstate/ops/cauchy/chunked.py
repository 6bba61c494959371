"""Cauchy sums as products of real matrices, over so few nodes at a time that no tensor holds every quotient.

The two terms of a conjugate pair are one with real coefficients: of a pole r + iω, with S = (z − r) R and
R = 1 / ((z − r)² + ω²),

    w/(z − λ) + w̄/(z − λ̄) = a S + b R,    a = 2 Re w,    b = −2 ω Im w.
"""

from __future__ import annotations

import torch

from ..._shapes import Tensor

QUOTIENTS = 1 << 17  # at a time: tensors of a megabyte


def cauchy(a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor, single: bool) -> Tensor:
    """Return Σ_n a_n S_n + b_n R_n for several sums ``[s r n]`` over each row of poles ``[r n]``: ``[s r l]``."""
    ab = torch.cat([a, b], -1).transpose(0, 1)
    dtype = torch.complex64 if single else torch.complex128
    blocks = [_complex(ab @ _quotients(real, imaginary, z)).to(dtype) for z in _split(nodes, real)]
    return torch.cat(blocks, -1).transpose(0, 1)


def cauchy_backward(
    grad: Tensor, a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and the poles' parts, by ∂S/∂r = 2S² − R, ∂R/∂r = 2SR, ∂S/∂ω = −2ωSR and
    ∂R/∂ω = −2ωR²."""
    ab = torch.cat([a, b], -1).transpose(0, 1)
    grad_ab, of_poles = torch.zeros_like(ab), torch.zeros_like(torch.cat([real, real], -1))
    for z, g in zip(_split(nodes, real), _split(grad.to(torch.complex128).transpose(0, 1), real), strict=True):
        g, quotients = torch.cat([g.real, g.imag], -1), _quotients(real, imaginary, z)
        grad_ab = grad_ab + g @ quotients.mT
        S_and_R = _complex(quotients)
        half, other = (_complex(ab.mT @ g).conj() * S_and_R).chunk(2, -2)
        of_poles = of_poles + (S_and_R * (half + other).repeat(1, 2, 1)).real.sum(-1)
    of_S, of_R = of_poles.chunk(2, -1)
    grad_a, grad_b = (x.contiguous() for x in grad_ab.transpose(0, 1).chunk(2, -1))
    return grad_a, grad_b, 2 * of_S - (a * grad_b).sum(0), -2 * imaginary * of_R


def _split(x: Tensor, poles: Tensor) -> tuple[Tensor, ...]:
    """Return a few nodes at a time."""
    return x.split(max(1, QUOTIENTS // max(1, poles.numel())), -1)


def _quotients(real: Tensor, imaginary: Tensor, nodes: Tensor) -> Tensor:
    """Return S, then R: ``[r 2n 2l]``, of each real parts, then imaginary ones."""
    x, y = nodes.real - real[..., None], nodes.imag
    pole = imaginary[..., None]
    square, mixed = x * x - (y - pole) * (y + pole), 2 * x * y
    size = square * square + mixed * mixed
    re, im = square / size, -mixed / size
    return torch.cat([torch.cat([x * re - y * im, x * im + y * re], -1), torch.cat([re, im], -1)], -2)


def _complex(x: Tensor) -> Tensor:
    """Return the complex numbers whose real parts are followed by the imaginary ones."""
    return torch.complex(*x.chunk(2, -1))
