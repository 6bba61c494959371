"""From a continuous system x′ = A x + B u to a discrete one x_t = Ā x_{t−1} + B̄ u_t.

Each rule takes A as a matrix ``[n, n]`` or, of a diagonal system, its diagonal ``[n]``, and returns Ā in the same form.
B is a vector ``[n]`` or a matrix ``[n, inputs]``. ``RULES`` has them all by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .._errors import check_choice
from .._shapes import Float, Inexact, Shaped


def generalised_bilinear(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float, alpha: float = 0.5
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā = (I − αΔA)⁻¹(I + (1−α)ΔA) and B̄ = (I − αΔA)⁻¹ΔB.

    Args:
        A: A matrix, or the diagonal of one.
        B: Input vector or matrix.
        dt: Δ, in the time of the system.
        alpha: How much of a step is taken implicitly: 0 is Euler's rule, 1 the backward one, ½ the bilinear one, which
            alone is of second order. From ½ on, every stable system stays stable.

    Raises:
        ValueError: If A is neither square nor a diagonal, or α is not in [0, 1].

    Source:
        Zhang, Chen and Hsu, Performance recovery in digital implementation of analogue systems (2007).
    """
    _check("generalised_bilinear", A, B)
    if not 0 <= alpha <= 1:
        raise ValueError(f"generalised_bilinear(alpha={alpha}): wanted a number from 0 to 1")
    if A.ndim == 1:
        left = 1 / (1 - alpha * dt * A)
        return left * (1 + (1 - alpha) * dt * A), _rows(left * dt, B)
    identity = np.eye(len(A))
    right = np.column_stack([identity + (1 - alpha) * dt * A, dt * B.reshape(len(A), -1)])
    solved = np.linalg.solve(identity - alpha * dt * A, right) if alpha else right
    return solved[:, : len(A)], solved[:, len(A) :].reshape(B.shape)


def euler(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā = I + ΔA and B̄ = ΔB, of first order; a fast stable mode becomes an unstable one."""
    return generalised_bilinear(A, B, dt, 0.0)


def backward_euler(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā = (I − ΔA)⁻¹ and B̄ = (I − ΔA)⁻¹ΔB, of first order."""
    return generalised_bilinear(A, B, dt, 1.0)


def bilinear(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā = (I − ΔA/2)⁻¹(I + ΔA/2) and B̄ = (I − ΔA/2)⁻¹ΔB (Tustin), of second order."""
    return generalised_bilinear(A, B, dt, 0.5)


def zoh(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā = e^{ΔA} and B̄ = ∫₀^Δ e^{sA} ds B, exact for inputs held over a step.

    Both come from one exponential, exp(Δ [[A, B], [0, 0]]), so that a singular A needs no care; on a diagonal, the
    integral is expm1(Δλ)/λ, and Δ at λ = 0.
    """
    _check("zoh", A, B)
    if A.ndim == 1:
        return np.exp(dt * A), _rows(dt * phi(dt * A), B)
    n, columns = len(A), B.reshape(len(A), -1)
    block = np.zeros((n + columns.shape[1], n + columns.shape[1]), dtype=np.result_type(A, B, np.float64))
    block[:n, :n], block[:n, n:] = A, columns
    exponential = matrix_exponential(dt * block)
    return exponential[:n, :n], exponential[:n, n:].reshape(B.shape)


def dirac(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā = e^{ΔA} and B̄ = B: an input is an impulse at the end of its step, as an event is."""
    _check("dirac", A, B)
    return np.exp(dt * A) if A.ndim == 1 else matrix_exponential(dt * A), B


def asynchronous(
    A: Inexact[np.ndarray, "n ..."],
    B: Inexact[np.ndarray, "n ..."],
    dt: float,
    elapsed: float | Float[np.ndarray, " t"] = 1.0,
) -> tuple[Inexact[np.ndarray, "... n"], Inexact[np.ndarray, "n ..."]]:
    """Return Ā_k = e^{δ Δt_k A} and B̄ = A⁻¹(e^{δA} − I)B: events that come at any time but weigh the same.

    Args:
        A: A matrix, or the diagonal of one.
        B: Input vector or matrix.
        dt: δ, the system's own step.
        elapsed: Δt_k, the time since the event before in units of δ; of several events, Ā gets an axis before its own.

    Source:
        Schöne et al., Scalable event-by-event processing with deep state-space models (2024).
    """
    gain = zoh(A, B, dt)[1]
    steps = dt * np.asarray(elapsed, dtype=np.float64).reshape(np.shape(elapsed) + (1,) * A.ndim)
    return np.exp(steps * A) if A.ndim == 1 else matrix_exponential(steps * A), gain


Rule = Callable[..., tuple[np.ndarray, np.ndarray]]
RULES: dict[str, Rule] = {
    "euler": euler,
    "backward_euler": backward_euler,
    "bilinear": bilinear,
    "generalised_bilinear": generalised_bilinear,
    "zoh": zoh,
    "dirac": dirac,
    "asynchronous": asynchronous,
}


def discretize(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], dt: float, rule: str = "zoh"
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā and B̄ by a rule's name.

    Args:
        A: A matrix, or the diagonal of one.
        B: Input vector or matrix.
        dt: Δ, in the time of the system.
        rule: A name in ``RULES``.

    Raises:
        ValueError: If there is no such rule, or shapes do not go together.
    """
    check_choice("discretize", "rule", rule, RULES)
    return RULES[rule](A, B, dt)


def scale_invariant_step(
    A: Inexact[np.ndarray, "n ..."], B: Inexact[np.ndarray, "n ..."], k: int, rule: str = "bilinear"
) -> tuple[Inexact[np.ndarray, "n ..."], Inexact[np.ndarray, "n ..."]]:
    """Return Ā_k and B̄_k of x′ = (A x + B u)/t for the k-th step, from t = kΔ on: LegS as HiPPO has it.

    Δ cancels, so that the memory has no scale of time: every rule is taken with A/k and step 1, but "zoh" solves the
    step exactly, which on the scale log t has the length log((k+1)/k).

    Args:
        A: A matrix, or the diagonal of one.
        B: Input vector or matrix.
        k: Which step, from 1.
        rule: "euler" (unstable while k is below n/2), "backward_euler", "bilinear" or "zoh".

    Raises:
        ValueError: If k is below 1, or there is no such rule.

    Source:
        Gu et al., arXiv:2008.07669, section 2.3.
    """
    check_choice("scale_invariant_step", "rule", rule, ("euler", "backward_euler", "bilinear", "zoh"))
    if k < 1:
        raise ValueError(
            f"scale_invariant_step(k={k}): steps are counted from 1, for x′ = (A x + B u)/t starts after 0"
        )
    return discretize(A, B, float(np.log1p(1 / k)) if rule == "zoh" else 1 / k, rule)


def phi(z: Inexact[np.ndarray, "*n"]) -> Inexact[np.ndarray, "*n"]:
    """Return (eᶻ − 1)/z, and 1 at z = 0, to all digits."""
    still = z == 0
    return np.where(still, 1, np.expm1(z) / np.where(still, 1, z))


def _rows(gain: Inexact[np.ndarray, " n"], B: Inexact[np.ndarray, "n ..."]) -> Inexact[np.ndarray, "n ..."]:
    return gain.reshape(-1, *(1,) * (B.ndim - 1)) * B


def matrix_exponential(A: Inexact[np.ndarray, "*b n n"]) -> Inexact[np.ndarray, "*b n n"]:
    """Return e^A, of one matrix or of several."""
    # Not SciPy's, which up to 1.17 at least is wrong in the first digit for triangular matrices whose diagonal is equal
    # up to rounding: it divides by the differences. PyTorch's polynomial for norms up to 0.05 errs by 1e-11 there;
    # where it would be taken another entry on the diagonal, of 0.1, leads to the next one, which is exact to rounding.
    n, norm = A.shape[-1], np.abs(A).sum(-2).max(-1)
    wider = np.zeros((*A.shape[:-2], n + 1, n + 1), dtype=A.dtype)
    wider[..., :n, :n], wider[..., n, n] = A, np.where((norm > 1e-4) & (norm < 0.1), 0.1, 0)
    return np.asarray(torch.linalg.matrix_exp(torch.from_numpy(wider)))[..., :n, :n]


def _check(where: str, A: Shaped[np.ndarray, "..."], B: Shaped[np.ndarray, "..."]) -> None:
    if A.ndim not in (1, 2) or A.shape != A.shape[:1] * A.ndim or B.ndim not in (1, 2) or len(B) != len(A):
        raise ValueError(
            f"{where}: A {list(A.shape)} must be [n, n], or [n] for a diagonal, and B {list(B.shape)} must be [n] or"
            " [n, inputs]"
        )
