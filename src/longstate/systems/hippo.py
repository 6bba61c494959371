"""HiPPO measures: the systems x′ = A x + B u whose state holds the coefficients of the past in a basis of functions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class DiagonalSystem(NamedTuple):
    """A system in its own eigenbasis, one of each conjugate pair of modes.

    Attributes:
        eigenvalues: λ ``[n/2]``, with positive imaginary part, the smallest first.
        B: Input vector in the eigenbasis ``[n/2]``.
        basis: The eigenvectors V, the columns of ``[n, n/2]``: x = 2 Re(V z).
    """

    eigenvalues: NDArray[np.complex128]
    B: NDArray[np.complex128]
    basis: NDArray[np.complex128]


def legs(n: int) -> tuple[Matrix, Matrix]:
    """Return A ``[n, n]`` and B ``[n]`` of HiPPO-LegS, scaled Legendre polynomials over all of the past.

    A_nk = −√(2n+1) √(2k+1) for n > k, −(n+1) for n = k, else 0;  B_n = √(2n+1).

    Its eigenvalues are −1 … −n; it cannot be diagonalised stably.

    Source:
        Gu et al., arXiv:2008.07669, theorem 2.
    """
    B = np.sqrt(2 * np.arange(n) + 1.0)
    A = -np.tril(np.outer(B, B), -1) - np.diag(np.arange(n) + 1.0)
    return A, B


def legs_normal(n: int) -> tuple[Matrix, Matrix]:
    """Return A + PPᵀ ``[n, n]`` and B ``[n]``: the normal part of LegS, P_n = √(n + ½), a skew matrix − ½I.

    Source:
        Gu et al., arXiv:2111.00396, appendix C; as the source of S4D-LegS, arXiv:2206.11893, section 4.
    """
    A, B = legs(n)
    return A + np.outer(B, B) / 2, B


def diagonal_modes(A: Matrix, B: Matrix) -> DiagonalSystem:
    """Return a normal system with conjugate pairs of modes (skew-symmetric plus a multiple of I) in its eigenbasis.

    Raises:
        ValueError: If A is not skew-symmetric but for a multiple of I, or of odd size.
    """
    size = len(A)
    shift = np.trace(A) / size
    skew = A - shift * np.eye(size)
    if size % 2 or not np.allclose(skew, -skew.T, atol=1e-9 * max(1, np.abs(A).max())):
        raise ValueError(
            f"diagonal_modes: A {list(A.shape)} must be of even size and skew-symmetric plus a multiple of I"
        )
    # −i·skew is Hermitian: its eigenvalues are real and its eigenvectors orthonormal to full precision.
    frequencies, V = np.linalg.eigh(-1j * skew)
    eigenvalues, basis, projected = (
        np.asarray(x, dtype=np.complex128)
        for x in (shift + 1j * frequencies[size // 2 :], V[:, size // 2 :], V[:, size // 2 :].conj().T @ B)
    )
    return DiagonalSystem(eigenvalues, projected, basis)
