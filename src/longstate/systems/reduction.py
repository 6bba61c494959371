"""Fewer states for nearly the same system: Gramians, Hankel singular values, balanced and modal truncation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._shapes import Float, Inexact
from .response import stability_margin
from .state_space import StateSpace


class Reduced(NamedTuple):
    """A smaller system and what it may err by.

    Attributes:
        system: The smaller system.
        weights: What each state of the whole one weighs, the largest first: Hankel singular values, or modes'.
        bound: No wave, of any frequency, comes out wrong by more than this times its amplitude.
    """

    system: StateSpace
    weights: Float[np.ndarray, " n"]
    bound: float


def controllability_gramian(system: StateSpace) -> Inexact[np.ndarray, "n n"]:
    """Return W with A W + W A* + B B* = 0, or A W A* − W + B B* = 0 of a discrete system: which states inputs reach.

    Raises:
        ValueError: If the system is not stable.
    """
    from scipy import linalg  # here: SciPy is large, and a model needs none of it

    _check_stable("controllability_gramian", system)
    drive = system.B @ system.B.conj().T
    if system.dt is None:
        return np.asarray(linalg.solve_continuous_lyapunov(system.A, -drive))
    return np.asarray(linalg.solve_discrete_lyapunov(system.A, drive))


def observability_gramian(system: StateSpace) -> Inexact[np.ndarray, "n n"]:
    """Return the controllability Gramian of A*, C*: which states outputs show."""
    return controllability_gramian(_dual(system))


def diagonal_gramian(
    eigenvalues: Inexact[np.ndarray, " n"], B: Inexact[np.ndarray, "n ..."], dt: float | None = None
) -> Inexact[np.ndarray, "n n"]:
    """Return the controllability Gramian of a diagonal system, in closed form.

    W_ij = −(B B*)_ij / (λ_i + λ̄_j), or (B B*)_ij / (1 − λ_i λ̄_j) when discrete. With λ̄ and C* for λ and B it is the
    observability Gramian.

    Args:
        eigenvalues: λ, inside the region of stability.
        B: Input vector or matrix.
        dt: The step of a discrete system, None of a continuous one.

    Raises:
        ValueError: If the system is not stable.
    """
    if not (np.all(eigenvalues.real < 0) if dt is None else np.all(np.abs(eigenvalues) < 1)):
        raise ValueError("diagonal_gramian: an eigenvalue is not inside the region of stability: there is no Gramian")
    rows = B.reshape(len(B), -1)
    left, right = eigenvalues[:, None], eigenvalues.conj()
    return np.asarray(rows @ rows.conj().T / (-(left + right) if dt is None else 1 - left * right))


def hankel_singular_values(system: StateSpace) -> Float[np.ndarray, " n"]:
    """Return √eig(W_c W_o), the largest first: what each state of a balanced system passes from past to future.

    Raises:
        ValueError: If the system is not stable.
    """
    return _balance(system)[1]


def balanced_truncation(system: StateSpace, order: int) -> Reduced:
    """Return the system of the states that weigh most, by the square-root method.

    The H∞ norm of the error is at most 2 Σ_{i>order} σ_i, σ the Hankel singular values.

    Args:
        system: A stable system.
        order: States to keep.

    Raises:
        ValueError: If the system is not stable, or the order is not between 0 and n.

    Source:
        Moore, Principal component analysis in linear systems (1981); Enns (1984) and Glover (1984) for the bound.
    """
    _check_order("balanced_truncation", system, order)
    (left, U, Vh, right), weights = _balance(system)
    if order and weights[order - 1] <= 1e-14 * weights[0]:
        raise ValueError(
            f"balanced_truncation(order={order}): only {int((weights > 1e-14 * weights[0]).sum())} states weigh"
            " anything. Keep no more of them."
        )
    scale = 1 / np.sqrt(weights[:order])
    T = left @ Vh[:order].conj().T * scale
    inverse = scale[:, None] * (U[:, :order].conj().T @ right)
    return Reduced(system.changed(T, inverse), weights, float(2 * weights[order:].sum()))


def modal_truncation(system: StateSpace, order: int) -> Reduced:
    """Return the system of the modes that weigh most; those that are kept keep their poles exactly.

    A mode weighs ‖c‖ ‖b‖ / |Re λ|, or ‖c‖ ‖b‖ / (1 − |λ|) when discrete, which bounds its response to any wave; what is
    left out errs by the sum of its weights at most. Both modes of a conjugate pair stay or go.

    Args:
        system: A stable system with independent eigenvectors.
        order: States to keep; one less are where the last would be half of a pair.

    Raises:
        ValueError: If the system is not stable, or the order is not between 0 and n.
    """
    _check_stable("modal_truncation", system)
    _check_order("modal_truncation", system, order)
    eigenvalues, V = np.linalg.eig(system.A)
    B, C = np.linalg.solve(V, system.B), system.C @ V
    distance = -eigenvalues.real if system.dt is None else 1 - np.abs(eigenvalues)
    weights = np.linalg.norm(C, axis=0) * np.linalg.norm(B, axis=1) / distance
    real = not any(np.iscomplexobj(x) for x in (system.A, system.B, system.C))
    kept: list[int] = []
    columns: list[np.ndarray] = []
    for i in np.argsort(-weights, kind="stable"):
        paired = real and eigenvalues[i].imag != 0
        if eigenvalues[i].imag < 0 and real:
            continue  # it comes with its conjugate
        if len(kept) + 1 + paired > order:
            break
        mates = [int(i), int(np.argmin(np.abs(eigenvalues - eigenvalues[i].conj())))] if paired else [int(i)]
        kept += mates
        columns += [V[:, i].real, V[:, i].imag] if paired else [V[:, i].real if real else V[:, i]]
    T = np.stack(columns, axis=1) if columns else np.zeros((len(system.A), 0))
    # Rows that read these modes and no other: of V⁻¹, in the same real coordinates.
    rows = np.linalg.inv(V)[kept]
    inverse = np.linalg.solve(rows @ T, rows) if kept else T.T
    out = np.delete(weights, kept).sum()
    return Reduced(system.changed(T, inverse.real if real else inverse), np.sort(weights)[::-1], float(out))


def _balance(system: StateSpace) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    left, right = _root(controllability_gramian(system)), _root(observability_gramian(system)).conj().T
    U, weights, Vh = np.linalg.svd(right @ left)
    return (left, U, Vh, right), weights


def _root(gramian: Inexact[np.ndarray, "n n"]) -> Inexact[np.ndarray, "n n"]:
    """Return R with R R* = W: by eigenvalues, since a Gramian of more states than matter is not positive."""
    eigenvalues, V = np.linalg.eigh((gramian + gramian.conj().T) / 2)
    return np.asarray(V * np.sqrt(np.maximum(eigenvalues, 0)))


def _dual(system: StateSpace) -> StateSpace:
    A, C, B, D = (x.conj().T for x in (system.A, system.B, system.C, system.feedthrough))
    return StateSpace(A, B, C, D, system.dt)


def _check_stable(where: str, system: StateSpace) -> None:
    if not stability_margin(system) > 0:
        raise ValueError(f"{where}: the system is unstable (margin {stability_margin(system):.3g}), so has no Gramian")


def _check_order(where: str, system: StateSpace, order: int) -> None:
    if not 0 <= order <= len(system.A):
        raise ValueError(f"{where}(order={order}): wanted a number of states from 0 to {len(system.A)}")
