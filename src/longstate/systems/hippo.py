"""HiPPO measures: the systems x′ = A x + B u whose state holds the coefficients of the past in a basis of functions.

Every A here is normal but for a low rank: in some diagonal scaling, A + P Pᵀ is a skew-symmetric matrix plus a multiple
of I. That is what S4 and its diagonal successors are made of. ``MEASURES`` has them all by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._errors import check_choice
from .._shapes import Float, Inexact

Matrix = NDArray[np.float64]


class DiagonalSystem(NamedTuple):
    """A system in its own eigenbasis, one of each conjugate pair of modes.

    Attributes:
        eigenvalues: λ ``[n/2]``, with imaginary parts from 0 upwards, the smallest first.
        B: Input vector in the eigenbasis ``[n/2]``.
        basis: The eigenvectors V, the columns of ``[n, n/2]``: x = 2 Re(V z).
    """

    eigenvalues: NDArray[np.complex128]
    B: NDArray[np.complex128]
    basis: NDArray[np.complex128]


class NPLR(NamedTuple):
    """A system that is normal plus low rank, in the eigenbasis of its normal part: z′ = (Λ − P P*) z + B u.

    Of each conjugate pair of modes one is kept, so that P* z stands for 2 Re(P* z), and x = 2 Re(V z).

    Attributes:
        eigenvalues: Λ ``[n/2]``, imaginary parts from 0 upwards.
        P: The low rank in the eigenbasis ``[n/2, r]``; r may be 0.
        B: Input vector in the eigenbasis ``[n/2]``.
        basis: V ``[n, n/2]``.
        inverse: W ``[n/2, n]`` with z = W x: V* but for the measure's diagonal scaling.
    """

    eigenvalues: NDArray[np.complex128]
    P: NDArray[np.complex128]
    B: NDArray[np.complex128]
    basis: NDArray[np.complex128]
    inverse: NDArray[np.complex128]

    def whole(self) -> NPLR:
        """Return the same with both modes of every pair: A = V (Λ − P P*) W with nothing left out."""
        eigenvalues, P, B, inverse = (
            np.concatenate([x, x.conj()]) for x in (self.eigenvalues, self.P, self.B, self.inverse)
        )
        return NPLR(eigenvalues, P, B, np.hstack([self.basis, self.basis.conj()]), inverse)


def legs(n: int) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]`` and B ``[n]`` of HiPPO-LegS, scaled Legendre polynomials over all of the past.

    A_nk = −√(2n+1) √(2k+1) for n > k, −(n+1) for n = k, else 0;  B_n = √(2n+1).

    Its eigenvalues are −1 … −n; it cannot be diagonalised stably. In x′ = (A x + B u)/t the state is the projection of
    u on [0, t]; in x′ = A x + B u it is that of the past on an exponential scale of time.

    Source:
        Gu et al., arXiv:2008.07669, theorem 2.
    """
    B = _roots(n)
    A = -np.tril(np.outer(B, B), -1) - np.diag(np.arange(n) + 1.0)
    return A, B


def legs_normal(n: int) -> tuple[Matrix, Matrix]:
    """Return A + PPᵀ ``[n, n]`` and B ``[n]``: the normal part of LegS, P_n = √(n + ½), a skew matrix − ½I.

    Source:
        Gu et al., arXiv:2111.00396, appendix C; as the source of S4D-LegS, arXiv:2206.11893, section 4.
    """
    A, B = legs(n)
    return A + np.outer(B, B) / 2, B


def legsd(n: int) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]`` and B ``[n]`` of HiPPO-D: the normal part of LegS, with half of its input.

    Source:
        Gu et al., arXiv:2206.11893, section 4.
    """
    A, B = legs_normal(n)
    return A, B / 2


def legt(n: int) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]`` and B ``[n]`` of HiPPO-LegT: Legendre polynomials over a window of length 2.

    A_nk = −½ √(2n+1) √(2k+1) · (1 for n ≥ k, else (−1)^{n−k});  B_n = ½ √(2n+1).

    Twice both is the window of length 1.

    Source:
        Gu et al., arXiv:2008.07669, theorem 1.
    """
    R, sign = _roots(n), _signs(n)
    A: Matrix = -np.outer(R, R) / 2 * np.where(np.tri(n) > 0, 1.0, np.outer(sign, sign))
    return A, R / 2


def lmu(n: int, window: float = 1.0) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]`` and B ``[n]`` of the Legendre memory unit: LegT in another scaling.

    A_nk = (2n+1)/θ · (−1 for n < k, else (−1)^{n−k+1});  B_n = (−1)ⁿ (2n+1)/θ.

    Args:
        n: States.
        window: θ, the length of the past that is remembered, in the time of the system.

    Raises:
        ValueError: If the window is not positive.

    Source:
        Voelker, Kajić and Eliasmith, Legendre Memory Units (NeurIPS 2019), equations 2 and 3.
    """
    if not window > 0:
        raise ValueError(f"lmu(window={window}): wanted a positive length of time, such as 1.0")
    weight, sign = (2 * np.arange(n) + 1.0) / window, _signs(n)
    A = np.asarray(weight[:, None] * np.where(np.tri(n) > 0, -np.outer(sign, sign), -1.0), dtype=np.float64)
    return A, sign * weight


def lagt(n: int) -> tuple[Matrix, Matrix]:
    """Return A = ½I − tril(1) ``[n, n]`` and B = 1 ``[n]``: Laguerre functions e^{−s/2} L_n(s) of the time s ago.

    Source:
        Gu et al., arXiv:2008.07669, appendix D.2.
    """
    return np.eye(n) / 2 - np.tri(n), np.ones(n)


def tilted_lagt(n: int, beta: float = 1.0) -> tuple[Matrix, Matrix]:
    """Return A = ½(1 − β)I − tril(1) ``[n, n]`` and B = β ``[n]``: weights β e^{−(1+β)s/2} L_n(s) of the time s ago."""
    return (1 - beta) / 2 * np.eye(n) - np.tri(n), np.full(n, float(beta))


def generalised_lagt(n: int, alpha: float = 0.0, beta: float = 1.0) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]`` and B ``[n]`` of the generalised Laguerre polynomials L_n^(α).

    A = Λ⁻¹[−½(1+β)I − stril(1)]Λ;  B = Λ⁻¹ C(n+α, n) Γ(1−α)^{−½} β^{(1−α)/2};  Λ_n = √(Γ(n+α+1)/n!).

    Args:
        n: States.
        alpha: α, above −1 and below 1.
        beta: The tilt, positive.

    Raises:
        ValueError: If α or β lies outside.

    Source:
        Gu et al., arXiv:2008.07669, appendix D.2.
    """
    if not (-1 < alpha < 1 and beta > 0):
        raise ValueError(f"generalised_lagt(alpha={alpha}, beta={beta}): wanted −1 < alpha < 1 and beta > 0")
    scale = _laguerre_scale(n, alpha)
    # The diagonal stays out of the scaling, which would leave it equal up to rounding only: SciPy's expm, up to 1.17 at
    # least, divides by the differences of a triangular matrix's diagonal and is then wrong in the first digit.
    A = -(1 + beta) / 2 * np.eye(n) - np.tri(n, k=-1) * scale[:, None] / scale
    # C(k + α, k) as a product of quotients, all positive.
    first = np.cumprod([1.0, *((k + alpha) / k for k in range(1, n))])[:n]
    weight = math.gamma(1 - alpha) ** -0.5 * beta ** ((1 - alpha) / 2)
    return A, scale * first * weight


def fout(n: int) -> tuple[Matrix, Matrix]:
    """Return A = S − B Bᵀ ``[n, n]`` and B ``[n]``: Fourier coefficients over a window of length 2.

    S couples the states (2f, 2f+1), cosine and sine of frequency f, by ∓πf;  B = [1, 0, √2, 0, √2, 0, …].

    Source:
        Gu et al., How to train your HiPPO (2022), section 3.
    """
    B = _fourier_input(n)
    return _rotations(n, math.pi) - np.outer(B, B), B


def fourier_decay(n: int) -> tuple[Matrix, Matrix]:
    """Return A = S − ½ B Bᵀ ``[n, n]`` and ½B ``[n]``, with FouT's S and B."""
    B = _fourier_input(n)
    return _rotations(n, math.pi) - np.outer(B, B) / 2, B / 2


def foud(n: int) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]``, rotations by 2πf that decay as e^{−t/2}, and FouT's B ``[n]``: a normal system."""
    return _rotations(n, 2 * math.pi) - np.eye(n) / 2, _fourier_input(n)


class Measure(NamedTuple):
    """A measure and how it is normal plus low rank; each is a function of the number of states n.

    Attributes:
        system: A and B, at the measure's usual options.
        low_rank: P ``[n, r]``: diag(d)⁻¹ A diag(d) + P Pᵀ is a skew-symmetric matrix plus a multiple of I.
        scale: d ``[n]``.
    """

    system: Callable[[int], tuple[Matrix, Matrix]]
    low_rank: Callable[[int], Matrix]
    scale: Callable[[int], Matrix] = np.ones


def nplr(measure: str, n: int) -> NPLR:
    """Return a measure's system as z′ = (Λ − P P*) z + B u, by an eigendecomposition that is stable for any n.

    Args:
        measure: A name in ``MEASURES``.
        n: Real states, even: modes come in pairs.

    Raises:
        ValueError: If there is no such measure, or n is odd.

    Source:
        Gu et al., arXiv:2111.00396, theorem 1 and appendix C.
    """
    check_choice("nplr", "measure", measure, MEASURES)
    chosen = MEASURES[measure]
    return normal_plus_low_rank(*chosen.system(n), chosen.low_rank(n), chosen.scale(n))


def normal_plus_low_rank(
    A: Float[np.ndarray, "n n"],
    B: Float[np.ndarray, " n"],
    P: Float[np.ndarray, "n r"],
    scale: Float[np.ndarray, " n"] | None = None,
) -> NPLR:
    """Return x′ = A x + B u in the eigenbasis of diag(d)⁻¹ A diag(d) + P Pᵀ.

    Args:
        A: The system.
        B: Its input vector.
        P: What makes it normal.
        scale: d; 1 when absent.

    Raises:
        ValueError: If the sum is not a skew-symmetric matrix plus a multiple of I, or of odd size.
    """
    d = np.ones(len(A)) if scale is None else scale
    modes = diagonal_modes(A * d / d[:, None] + P @ P.T, B / d)
    adjoint = modes.basis.conj().T
    return NPLR(modes.eigenvalues, adjoint @ P, modes.B, modes.basis * d[:, None], adjoint / d)


def diagonal_modes(A: Float[np.ndarray, "n n"], B: Float[np.ndarray, " n"]) -> DiagonalSystem:
    """Return a normal system with conjugate pairs of modes (skew-symmetric plus a multiple of I) in its eigenbasis.

    Raises:
        ValueError: If A is not skew-symmetric but for a multiple of I, or of odd size.
    """
    size = len(A)
    shift = np.trace(A) / max(size, 1)
    skew = A - shift * np.eye(size)
    if size % 2 or not size or not np.allclose(skew, -skew.T, atol=1e-9 * max(1, np.abs(A).max())):
        raise ValueError(
            f"diagonal_modes: A {list(A.shape)} must be of even size and skew-symmetric plus a multiple of I"
        )
    # −i·skew is Hermitian: its eigenvalues are real and its eigenvectors orthonormal to full precision.
    frequencies, V = np.linalg.eigh(-1j * skew)
    still = np.abs(frequencies) <= 1e-12 * size * np.abs(frequencies).max()
    half = _pairs(V[:, still]) if still.any() else V[:, :0]
    moving = ~still & (frequencies > 0)
    frequencies = np.concatenate([np.zeros(half.shape[1]), frequencies[moving]])
    V = np.hstack([half, V[:, moving]])
    eigenvalues, basis, projected = (
        np.asarray(x, dtype=np.complex128) for x in (shift + 1j * frequencies, V, V.conj().T @ B)
    )
    return DiagonalSystem(eigenvalues, projected, basis)


def _pairs(V: Inexact[np.ndarray, "n still"]) -> Inexact[np.ndarray, "n pairs"]:
    """Return vectors that with their conjugates span what V spans: that of a real matrix's eigenvalue 0."""
    # What eigh returns there is any basis, of which one half need not be the conjugate of the other.
    real = np.linalg.svd(np.hstack([V.real, V.imag]))[0][:, : V.shape[1]]
    return (real[:, ::2] + 1j * real[:, 1::2]) / math.sqrt(2)


def _roots(n: int) -> Matrix:
    return np.sqrt(2 * np.arange(n) + 1.0)


def _signs(n: int) -> Matrix:
    return np.where(np.arange(n) % 2, -1.0, 1.0)


def _rotations(n: int, speed: float) -> Matrix:
    if n % 2:
        raise ValueError(f"Fourier measures hold a cosine and a sine of each frequency: n={n} is odd. Try n={n + 1}.")
    turn = np.zeros(max(n - 1, 0))
    turn[::2] = speed * np.arange(n // 2)
    return np.diag(turn, -1) - np.diag(turn, 1)


def _fourier_input(n: int) -> Matrix:
    B = np.zeros(n)
    B[::2] = math.sqrt(2)
    B[:1] = 1
    return B


def _laguerre_scale(n: int, alpha: float) -> Matrix:
    return np.exp([(math.lgamma(k + 1) - math.lgamma(k + alpha + 1)) / 2 for k in range(n)])


def _nothing(n: int) -> Matrix:
    return np.zeros((n, 0))


def _by_parity(n: int) -> Matrix:
    return _roots(n)[:, None] / math.sqrt(2) * np.stack([np.arange(n) % 2 == 0, np.arange(n) % 2 == 1], axis=1)


def _halves(n: int) -> Matrix:
    return np.full((n, 1), math.sqrt(0.5))


MEASURES: dict[str, Measure] = {
    "legs": Measure(legs, lambda n: np.sqrt(np.arange(n) + 0.5)[:, None]),
    "legt": Measure(legt, _by_parity),
    # LMU is 2/θ D LegT D⁻¹ with D_n = (−1)ⁿ √(2n+1), and θ = 1.
    "lmu": Measure(lmu, lambda n: math.sqrt(2) * _by_parity(n), lambda n: _signs(n) * _roots(n)),
    "lagt": Measure(lagt, _halves),
    "tilted_lagt": Measure(tilted_lagt, _halves),
    "generalised_lagt": Measure(generalised_lagt, _halves, lambda n: _laguerre_scale(n, 0.0)),
    "fout": Measure(fout, lambda n: _fourier_input(n)[:, None]),
    "fourier_decay": Measure(fourier_decay, lambda n: _fourier_input(n)[:, None] / math.sqrt(2)),
    "foud": Measure(foud, _nothing),
    "legsd": Measure(legsd, _nothing),
}
