"""From a kernel to a linear system: exactly, with as many states as taps, or with as few as will do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._shapes import Float, Inexact
from .state_space import StateSpace
from .structured import Diagonal


class Realization(NamedTuple):
    """A system found from its taps.

    Attributes:
        system: The system.
        singular_values: Of the Hankel matrix, the largest first: those that stand out say how many states to keep.
    """

    system: StateSpace
    singular_values: Float[np.ndarray, " k"]


def toeplitz_to_diagonal(
    taps: Float[np.ndarray, " n"], gamma: float = 1.0
) -> tuple[Diagonal, Inexact[np.ndarray, " n"], Inexact[np.ndarray, " n"]]:
    """Return A, B and C of a diagonal system with C A^l B = t_l for all l < n (ETSC).

        λ_s = γ e^{−2πis/(n+1)},    B = IFFT(t_0, t_1/γ, …, t_{n−1}/γ^{n−1}, −Σ),    C = 1,    s = 1 … n

    The last entry makes the sum, and so the mode s = 0, vanish. Beyond n taps the kernel goes on with period n + 1,
    with γ^{n+1} of its size each time.

    Args:
        taps: t, at least one.
        gamma: γ, positive; 1 gives a system that does not decay.

    Raises:
        ValueError: If there is no tap, or γ is not positive.

    Source:
        Qin and Zhong, Accelerating Toeplitz neural network with constant-time inference complexity (EMNLP 2023).
    """
    if not len(taps) or not gamma > 0:
        raise ValueError(f"toeplitz_to_diagonal(taps of {len(taps)}, gamma={gamma}): wanted a tap, and gamma > 0")
    n = len(taps)
    flat = taps / gamma ** np.arange(n, dtype=np.float64)
    B = np.fft.ifft(np.append(flat, -flat.sum()))[1:]
    angles = -2j * np.pi * np.arange(1, n + 1) / (n + 1)
    return Diagonal(gamma * np.exp(angles)), B, np.ones(n)


def eigensystem_realization(
    taps: Float[np.ndarray, "l ..."], order: int | None = None, tolerance: float = 1e-10, dt: float = 1.0
) -> Realization:
    """Return the smallest discrete system whose taps D, C B, C A B, … are given (Ho and Kalman; ERA).

    The Hankel matrix H_ij = t_{i+j+1} = C A^i A^j B has the rank of the system. With its singular value decomposition
    U Σ V*, the observability matrix is U Σ^{½}, B and C are the first columns of Σ^{½} V* and rows of U Σ^{½}, and
    A = Σ^{−½} U* H′ V Σ^{−½} with H′_ij = t_{i+j+2}.

    Args:
        taps: ``[l]``, or ``[l outputs inputs]``, at least two; of n states, 2 n + 1 taps and more say all.
        order: States to keep; as many as have singular values above the tolerance when absent.
        tolerance: Relative to the largest singular value.
        dt: The step of the system.

    Raises:
        ValueError: If there are too few taps, or the order is above the number of singular values.

    Source:
        Ho and Kalman (1966); Juang and Pappa, An eigensystem realization algorithm (1985).
    """
    blocks = taps.reshape(len(taps), -1, 1) if taps.ndim == 1 else taps
    if blocks.ndim != 3 or len(blocks) < 3:
        raise ValueError(
            f"eigensystem_realization: taps {list(taps.shape)} must be [l] or [l, outputs, inputs], with l of 3 or more"
        )
    _, outputs, inputs = blocks.shape
    rows = len(blocks) // 2
    columns = len(blocks) - 1 - rows
    index = 1 + np.arange(rows)[:, None] + np.arange(columns)
    hankel, later = (
        blocks[i].transpose(0, 2, 1, 3).reshape(rows * outputs, columns * inputs) for i in (index, index + 1)
    )
    U, weights, Vh = np.linalg.svd(hankel, full_matrices=False)
    found = int((weights > tolerance * weights[0]).sum()) if weights[0] > 0 else 0
    kept = found if order is None else order
    if not 0 <= kept <= found:
        raise ValueError(
            f"eigensystem_realization(order={kept}): the taps show {found} states above the tolerance {tolerance}."
            " Keep no more of them, or lower the tolerance."
        )
    root = np.sqrt(weights[:kept])
    observed, reached = U[:, :kept] * root, root[:, None] * Vh[:kept]
    A = (U[:, :kept] / root).T @ later @ (Vh[:kept].T / root)
    return Realization(StateSpace(A, reached[:, :inputs], observed[:outputs], blocks[0], dt), weights)
