"""Perturb, then diagonalise: eigenvectors one can compute with, of a system near one whose own are useless."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .hippo import Matrix, legs


class PerturbedSystem(NamedTuple):
    """A real system near another, in its own eigenbasis: A + E = V diag(λ) V⁻¹, one of each conjugate pair of modes.

    Attributes:
        eigenvalues: λ ``[n/2]``, imaginary parts above 0, the smallest first.
        B: Input vector in the eigenbasis ``[n/2]``.
        basis: The kept half of V, columns of length 1 ``[n, n/2]``: x = 2 Re(V z).
        inverse: The kept half of V⁻¹ ``[n/2, n]``: z = V⁻¹ x.
        perturbation: E ``[n, n]``.
    """

    eigenvalues: NDArray[np.complex128]
    B: NDArray[np.complex128]
    basis: NDArray[np.complex128]
    inverse: NDArray[np.complex128]
    perturbation: Matrix


def perturbed_legs(n: int, feedback: float = 0.1) -> PerturbedSystem:
    """Return HiPPO-LegS perturbed such that its eigenvectors are well conditioned and its transfer function stays.

        E = γ B Bᵀ,    input (1 − γ) B,    ‖E‖ = γ n²

    LegS itself has cond(V) = 10¹⁹ at n = 32. The general method minimises cond(V) plus a multiple of ‖E‖. Here E is
    that of the family γ B Bᵀ, on which both are known: the larger γ, the better the basis, with cond(V) < (1 − γ)/γ
    (measured, n up to 256); and the transfer function to every state is that of LegS times

        1/(1 + ρ Π(s)),    ρ = γ/(1 − γ),    Π(s) = ∏_k (s − k)/(s + k + 1),    |Π(iω)| ≤ 1.

    So it errs by at most ρ/(1 − ρ), relatively, at every frequency, and all modes decay at least as e^{−t/2}. γ = ½ is
    the normal part of LegS with half its input, which S4D takes: there 1 + Π comes near 0 at ω = Θ(n²). In words, the
    memory hears 1 − γ of its input and γ of what it holds the present to be, which is Bᵀx.

    Args:
        n: Real states, even: modes come in pairs.
        feedback: γ, over 0 and up to ½.

    Raises:
        ValueError: If n is odd, γ lies outside, or is so small for this n that there are real modes.

    Source:
        The method and the spikes of S4D's transfer function: Yu et al., arXiv:2310.01698.
    """
    if n < 2 or n % 2:
        raise ValueError(f"perturbed_legs(n={n}): modes come in conjugate pairs. Try n={max(2, n + 1)}.")
    if not 0 < feedback <= 0.5:
        raise ValueError(f"perturbed_legs(feedback={feedback}): wanted a number over 0 and up to 0.5, such as 0.1")
    A, B = legs(n)
    perturbation = feedback * np.outer(B, B)
    values, V = np.linalg.eig(A + perturbation)
    kept = np.flatnonzero(values.imag > 0)
    if 2 * len(kept) < n:
        raise ValueError(
            f"perturbed_legs(n={n}, feedback={feedback}): perturbed so little, it has real modes, which are no pairs. "
            "Try feedback=0.1."
        )
    kept = kept[np.argsort(values.imag[kept])]
    eigenvalues, basis, inverse = (
        np.asarray(x, dtype=np.complex128) for x in (values[kept], V[:, kept], np.linalg.inv(V)[kept])
    )
    return PerturbedSystem(eigenvalues, (1 - feedback) * (inverse @ B), basis, inverse, perturbation)
