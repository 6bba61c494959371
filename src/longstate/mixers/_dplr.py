"""Fixed systems of a diagonal minus a low rank: convolved, as dense matrices, and step by step.

A = Λ − P Q* by the bilinear rule. Of conjugate modes one is kept: Q* x and C · x stand for twice the real part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .._shapes import Float, Inexact, Tensor
from ..ops import cauchy, dplr_scan, state_space
from ..ops._register import without_autocast
from ..ops.convolution.chunked import fft
from ..timeline import Timeline
from ._diagonal import CONVOLUTION_FROM

CHUNKS = 32  # of a long sequence, whose last state comes by that many steps: twice as many would save one squaring
FEW = 8  # steps up to which those by Woodbury's identity take no longer than the powers of a dense matrix


class System(NamedTuple):
    """x′ = (Λ − P Q*) x + B u, y = C · x, of each channel, with its step Δ.

    Attributes:
        poles: Λ ``[d n]``.
        P: ``[d n r]``.
        Q: ``[d n r]``.
        B: ``[d n]``.
        C: ``[d n]``.
        dt: Δ ``[d]``.
    """

    poles: Inexact[Tensor, "d n"]
    P: Inexact[Tensor, "d n r"]
    Q: Inexact[Tensor, "d n r"]
    B: Inexact[Tensor, "d n"]
    C: Inexact[Tensor, "d n"]
    dt: Float[Tensor, " d"]

    def double(self) -> System:
        """Return the same in double precision."""
        return System(*(x.to(torch.promote_types(x.dtype, torch.float64)) for x in self))


def run(
    u: Float[Tensor, "b t d"], system: System, initial: Inexact[Tensor, "b d n"] | None, timeline: Timeline
) -> tuple[Float[Tensor, "b t d"], Inexact[Tensor, "b d n"]]:
    """Return outputs and the final state. ``timeline.dt`` scales Δ."""
    elapsed, start, valid = timeline
    # An exported graph takes any length, so it has the face that does; asking for the length would be a promise.
    length = None if torch.compiler.is_exporting() else u.shape[1]
    if elapsed is not None or (length is not None and length <= FEW):
        dt = system.dt.expand_as(u) if elapsed is None else system.dt * elapsed.to(u.dtype)[..., None]
        return dplr_scan(u, dt, *system[:-1], initial, start=start, valid=valid)
    if start is None and valid is None and length is not None and length >= CONVOLUTION_FROM:
        with without_autocast(u):
            return convolve(u, system, initial)
    A, B = (x.to(u.dtype) for x in dense(system))
    C = _as_real(2 * system.C.conj())
    before = None if initial is None else _as_real(initial)
    y, final = state_space(u, A, B, C, before, start=start, valid=valid)
    return y, _as_complex(final)


def dense(system: System) -> tuple[Float[Tensor, "d m m"], Float[Tensor, "d m"]]:
    """Return Ā and B̄ in double precision, of the states (Re x, Im x): as many real ones.

    By Woodbury's identity, with E = 1/(1 − ΔΛ/2) and M = I + Δ/2 Q* E P,

        Ā = E (1 + ΔΛ/2) − Δ E P M⁻¹ Q* E,    B̄ = Δ (E B − Δ/2 E P M⁻¹ Q* E B)
    """
    poles, P, Q, B, _, dt = system.double()
    half = dt[:, None] / 2
    E = 1 / (1 - half * poles)
    write, read = _as_real(E[..., None] * P, 1), 2 * _as_real(E.conj()[..., None] * Q, 1)
    middle = torch.eye(P.shape[-1], dtype=dt.dtype, device=dt.device) + half[..., None] * (read.mT @ _as_real(P, 1))
    write = 2 * half[..., None] * torch.linalg.solve(middle, write, left=False)
    D = E * (1 + half * poles)
    rotation = torch.cat(
        [torch.cat([torch.diag_embed(x) for x in row], -1) for row in ((D.real, -D.imag), (D.imag, D.real))], -2
    )
    drive = _as_real(E * B) - (write @ (read.mT @ _as_real(B)[..., None]))[..., 0] / 2
    return rotation - write @ read.mT, 2 * half * drive


def convolve(u: Tensor, system: System, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return outputs and the final state of a plain sequence, by transforms and a tree of powers."""
    length = u.shape[1]
    taps = responses(system, length, u.dtype, initial)
    y = fft(u, taps[0].to(u.dtype), length)
    if initial is not None:
        y = y + taps[1:].to(u.dtype).mT
    return y, _last(u, *dense(system), initial)


def responses(
    system: System, length: int, dtype: torch.dtype, initial: Inexact[Tensor, "b d n"] | None = None
) -> Float[Tensor, "_ d l"]:
    """Return the kernel K_l = C Ā^l B̄ and, after it, the response C Ā^{l+1} x to each initial state.

    The transfer function is known where Cauchy sums are. At z on a circle of radius ρ < 1, with g = 2(1 − z)/(1 + z),

        Σ_l K_l z^l = 2/(1 + z) · C (g − ΔA)⁻¹ ΔB,

    and C Ā^{l+1} x is the kernel of the input vector (I + ΔA/2) x. Each p q* of the low rank turns the sums
    k_vw = v (g − ΔΛ)⁻¹ w into k_vw − k_vp k_qw / (1 + k_qp). A transform of N nodes returns K_l ρ^l, onto which
    K_{l+N} ρ^{l+N} is wrapped: ρ is such that this tail and the roundings, which are divided by ρ^l, are alike. Then
    Ā^length, by which others cut the tail off, is not needed.
    """
    poles, P, Q, B, C, dt = system.double()
    step = dt[:, None]
    # Relative errors of 2⁻⁵³ to the power of N/(N + length): 4e-11 and 2e-13.
    count = (4 if dtype == torch.float64 else 2) * length
    radius = 2.0 ** (-53 / (count + length))
    angle = torch.arange(count // 2 + 1, dtype=torch.float64, device=dt.device) * (-2 * math.pi / count)
    z = torch.polar(torch.full_like(angle, radius), angle)
    drives = [step * B]
    if initial is not None:
        x = initial.to(poles.dtype)
        low_rank = (P @ (2 * (Q.mH @ x[..., None]).real).to(P.dtype))[..., 0]
        drives += (x + step / 2 * (poles * x - low_rank)).unbind(0)
    columns = [*drives, *(step[..., None] * P).unbind(-1)]
    rows = torch.stack([C, *Q.conj().unbind(-1)])
    sums = cauchy(rows[:, None] * torch.stack(columns), 2 * (1 - z) / (1 + z), step * poles)
    for _ in range(P.shape[-1]):
        above, last = sums[:-1], sums[-1:]
        sums = above[:, :-1] - above[:, -1:] * (last[:, :-1] / (1 + last[:, -1:]))
    age = torch.arange(length, dtype=torch.float64, device=dt.device)
    return torch.fft.irfft(sums[0] * (2 / (1 + z)), n=count)[..., :length] * radius**-age


def _last(u: Tensor, A: Tensor, B: Tensor, initial: Tensor | None) -> Tensor:
    """Return the state after all steps: what each of a few chunks writes, and a power of Ā from chunk to chunk."""
    length = u.shape[1]
    chunk = 1 << (max(1, length // CHUNKS) - 1).bit_length()
    x = u.new_zeros(u.shape[2], len(u), B.shape[-1]) if initial is None else _as_real(initial).transpose(0, 1)
    columns, power = B[..., None], A  # Ā^{c−1} B̄ … B̄, and Ā^c
    while columns.shape[-1] < chunk:
        if initial is not None and length & columns.shape[-1]:
            x = x @ power.mT.to(u.dtype)
        columns, power = torch.cat([power @ columns, columns], -1), power @ power
    # Zeros before the first step: its chunk may be a part of one, through which the initial state has come above.
    filled = pad(u.permute(2, 0, 1), (-length % chunk, 0)).unflatten(-1, (-1, chunk))
    written = (filled.flatten(1, 2) @ columns.mT.to(u.dtype)).unflatten(1, filled.shape[1:3])
    through = power.mT.to(u.dtype)
    for j, states in enumerate(written.unbind(2)):
        x = states + (x if j == 0 and length % chunk else x @ through)
    return _as_complex(x.transpose(0, 1))


def _as_real(x: Tensor, axis: int = -1) -> Tensor:
    """Return real parts, then imaginary ones, along an axis."""
    return torch.cat([x.real, x.imag], axis)


def _as_complex(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))
