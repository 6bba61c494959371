"""From a continuous system x′ = A x + B u to a discrete one x_t = Ā x_{t−1} + B̄ u_t."""

from __future__ import annotations

import numpy as np
import torch

from .hippo import Matrix


def zoh(A: Matrix, B: Matrix, dt: float) -> tuple[Matrix, Matrix]:
    """Return Ā = e^{ΔA} and B̄ = ∫₀^Δ e^{sA} ds B, exact for inputs held over a step.

    Both come from one exponential, exp(Δ [[A, B], [0, 0]]), so that a singular A needs no care.
    """
    n, columns = len(A), B.reshape(len(A), -1)
    block = np.zeros((n + columns.shape[1], n + columns.shape[1]))
    block[:n, :n], block[:n, n:] = A, columns
    exponential = torch.linalg.matrix_exp(torch.from_numpy(dt * block)).numpy()
    return exponential[:n, :n], exponential[:n, n:].reshape(B.shape)


def bilinear(A: Matrix, B: Matrix, dt: float) -> tuple[Matrix, Matrix]:
    """Return Ā = (I − ΔA/2)⁻¹(I + ΔA/2) and B̄ = (I − ΔA/2)⁻¹ΔB (Tustin), of second order."""
    identity = np.eye(len(A))
    left = identity - dt / 2 * A
    solved = np.linalg.solve(left, np.column_stack([identity + dt / 2 * A, dt * B.reshape(len(A), -1)]))
    result: Matrix = np.asarray(solved, dtype=np.float64)
    return result[:, : len(A)], result[:, len(A) :].reshape(B.shape)
