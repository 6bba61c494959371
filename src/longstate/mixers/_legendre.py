"""The memory c′ = (A c + B u)/t of HiPPO-LegS, step by step or entry by entry.

A step of length s maps c to R(sA) c + …, and every R(sA) is lower triangular. Two faces compute the same: few steps
one after another, each with all entries of the state at once; many steps at once, one entry after another. Each takes
inputs u ``[b t d]``, lengths s ``[b t]``, the memory before ``[b d n]`` and a read-out C ``[d n]``, and returns C c of
every step and the last memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from .._shapes import Bool, Float, Tensor
from ..ops.scan import scan

Quadrature = tuple[list[float], list[list[float]]]


class _Rates(NamedTuple):
    """What a step does to each entry of the state and to what that leaves of the input, ``[… n]``.

    c_k = decay · c_k before + gain · √(2k+1) r_k,    r_{k+1} = passed · r_k − weight · √(2k+1) · c_k before
    """

    decay: Tensor
    gain: Tensor
    weight: Tensor
    passed: Tensor


def _rates(n: int, step: Tensor, implicit: float, dtype: torch.dtype) -> _Rates:
    """Return the coefficients of the rule that takes A c at α of a step's end and 1 − α of its begin.

    With m = α c + (1 − α) c before, row k of c = c before + s(A m + B u) is c_k before + s(√(2k+1) r_k − (k+1) m_k),
    where r_k = u − Σ_{j<k} √(2j+1) m_j: what the entries below leave of the input.
    """
    k, step = torch.arange(n, dtype=torch.float64, device=step.device), step[..., None]
    weight = 1 / (1 + implicit * step * (k + 1))
    decay = (1 - (1 - implicit) * step * (k + 1)) * weight
    return _Rates(*(z.to(dtype) for z in (decay, step * weight, weight, (1 - implicit * step * k) * weight)))


def rational_by_entry(
    u: Float[Tensor, "b t d"],
    step: Float[Tensor, "b t"],
    memory: Float[Tensor, "b d n"],
    C: Float[Tensor, "d n"],
    start: Bool[Tensor, "b t"] | None,
    implicit: float,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Run the rule with A c at α of a step's end: n scans over time, a cascade in which r_k drives entry k."""
    y, residual, finals = torch.zeros_like(u), u, []
    rates = _rates(C.shape[-1], step, implicit, u.dtype)
    for k in range(C.shape[-1]):
        root = math.sqrt(2 * k + 1)
        decay, gain = rates.decay[..., k, None], root * rates.gain[..., k, None]
        c, final = scan(decay.expand(u.shape), gain * residual, memory[..., k], start=start)
        middle = implicit * c + (1 - implicit) * _before(c, memory[..., k], start)
        residual = residual - root * middle
        y = y + C[:, k] * c
        finals.append(final)
    return y, torch.stack(finals, -1)


def rational_by_step(
    u: Float[Tensor, "b t d"],
    step: Float[Tensor, "b t"],
    memory: Float[Tensor, "b d n"],
    C: Float[Tensor, "d n"],
    start: Bool[Tensor, "b t"] | None,
    implicit: float,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Run the same rule step by step, with the r_k by a scan over the entries."""
    outputs, memory = [u[:, :0]], memory.clone()
    roots = torch.arange(1, 2 * C.shape[-1], 2, device=u.device).to(u.dtype).sqrt()
    for i in range(u.shape[1]):
        memory = memory if start is None else memory.masked_fill(start[:, i, None, None], 0)
        rates = _rates(C.shape[-1], step[:, i], implicit, u.dtype)
        fed = -(roots * rates.weight)[..., None] * memory.mT
        left, _ = scan(rates.passed[..., None].expand(fed.shape), fed, u[:, i])
        residual = torch.cat([u[:, i, None], left[:, :-1]], 1).mT
        memory = rates.decay[:, None] * memory + (roots * rates.gain)[:, None] * residual
        outputs.append((memory * C).sum(-1)[:, None])
    return torch.cat(outputs, 1), memory


def exact_by_entry(
    u: Float[Tensor, "b t d"],
    step: Float[Tensor, "b t"],
    memory: Float[Tensor, "b d n"],
    C: Float[Tensor, "d n"],
    start: Bool[Tensor, "b t"] | None,
    quadrature: Quadrature,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Run c = e + e^{A log(1 + s)} (c before − e), e = (u, 0, 0, …), exact for held inputs: n scans over time, with all
    the entries below to drive entry k: n²/2 products, and slow, but of any number of steps."""
    y = torch.zeros_like(u)
    finals: list[Tensor] = []
    deviations: list[Tensor] = []
    matrices = dilation(step, quadrature).to(u.dtype)
    for k in range(C.shape[-1]):
        decay, driven = matrices[..., k, k, None], u - matrices[..., 0, :1] * u
        if k:
            driven = (matrices[..., k, None, :k] @ torch.stack(deviations, 2)).squeeze(2)
        c, final = scan(decay.expand(u.shape), driven, memory[..., k], start=start)
        before = _before(c, memory[..., k], start)
        deviations.append(before if k else before - u)
        y = y + C[:, k] * c
        finals.append(final)
    return y, torch.stack(finals, -1)


def exact_by_step(
    u: Float[Tensor, "b t d"],
    step: Float[Tensor, "b t"],
    memory: Float[Tensor, "b d n"],
    C: Float[Tensor, "d n"],
    start: Bool[Tensor, "b t"] | None,
    quadrature: Quadrature,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Run the same, step by step."""
    outputs, memory = [u[:, :0]], memory.clone()
    matrices = dilation(step, quadrature).to(u.dtype)
    for i in range(u.shape[1]):
        memory = memory if start is None else memory.masked_fill(start[:, i, None, None], 0)
        e = torch.cat([u[:, i, :, None], torch.zeros_like(memory[..., 1:])], -1)
        memory = e + (memory - e) @ matrices[:, i].mT
        outputs.append((memory * C).sum(-1)[:, None])
    return torch.cat(outputs, 1), memory


def _before(c: Tensor, initial: Tensor, start: Tensor | None) -> Tensor:
    """Return the entry before each step."""
    before = torch.cat([initial[:, None], c], 1)[:, :-1]  # cut last: an exported graph takes one step too
    return before if start is None else before.masked_fill(start[..., None], 0)


def legendre(n: int, at: Float[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
    """Return √(2k+1) P_k(2x − 1) for k < n: polynomials that are orthonormal on [0, 1]."""
    z = 2 * at - 1
    values = [torch.ones_like(z), z]
    for k in range(1, n - 1):
        values.append(((2 * k + 1) * z * values[k] - k * values[k - 1]) / (k + 1))
    roots = torch.arange(1, 2 * n, 2, device=at.device).to(at.dtype).sqrt()
    return torch.stack(values[:n], -1) * roots


def dilation(step: Float[Tensor, "*b"], quadrature: Quadrature) -> Float[Tensor, "*b n n"]:
    """Return e^{A log(1 + s)} of LegS: what a function on [0, 1] becomes on [0, x], x = 1/(1 + s), with 0 behind it.

        Φ_jk = x ∫₀¹ p_j(xz) p_k(z) dz,    p_k(z) = √(2k+1) P_k(2z − 1)

    Gauss's quadrature is exact for these polynomials, and no number in it is large; the eigenvectors of LegS, powers of
    z, would be useless.
    """
    nodes, weighted = (torch.tensor(values, dtype=step.dtype, device=step.device) for values in quadrature)
    x = 1 / (1 + step[..., None])
    return x[..., None] * legendre(len(nodes), x * nodes).mT @ weighted


def gauss(n: int) -> Quadrature:
    """Return n nodes on [0, 1] and weight · p_k at each, exact for products of polynomials of degrees below n."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    polynomials = np.polynomial.legendre.legvander(nodes, n - 1) * np.sqrt(2 * np.arange(n) + 1)
    return ((nodes + 1) / 2).tolist(), (weights[:, None] / 2 * polynomials).tolist()
