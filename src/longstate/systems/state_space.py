"""A linear system with any number of inputs and outputs, as control theory writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._shapes import Inexact
from .discretization import discretize


@dataclass(frozen=True, eq=False)
class StateSpace:
    """A continuous or discrete linear system.

        x′(t) = A x(t) + B u(t)    or    x_{t+1} = A x_t + B u_t,        y = C x + D u

    The discrete form is that of SciPy and python-control, in which an input reaches the output through the state one
    step later. The layers of this library have x_t = A x_{t−1} + B u_t, y_t = C x_t + D u_t: ``from_recurrence`` turns
    one into the other.

    Args:
        A: ``[n n]``, real or complex; so are the others.
        B: ``[n inputs]``, or ``[n]`` for one input.
        C: ``[outputs n]``, or ``[n]`` for one output.
        D: ``[outputs inputs]``, or a number for all entries; 0 when absent.
        dt: The step of a discrete system, None of a continuous one.

    Raises:
        ValueError: If shapes do not go together, or the step is not positive.
    """

    A: Inexact[np.ndarray, "n n"]
    B: Inexact[np.ndarray, "n ..."]
    C: Inexact[np.ndarray, "... n"]
    D: Inexact[np.ndarray, "..."] | float = 0.0
    dt: float | None = None

    def __post_init__(self) -> None:
        A, B, C, D = (np.asarray(x) for x in (self.A, self.B, self.C, self.D))
        A, B, C, D = (x if np.iscomplexobj(x) else x.astype(np.float64) for x in (A, B, C, D))
        B, C = B[:, None] if B.ndim == 1 else B, C[None] if C.ndim == 1 else C
        n = len(A)
        if A.shape != (n, n) or B.ndim != 2 or len(B) != n or C.ndim != 2 or C.shape[1] != n:
            raise ValueError(
                f"StateSpace: A {list(A.shape)}, B {list(B.shape)} and C {list(C.shape)} must be [n, n], [n, inputs]"
                " and [outputs, n]"
            )
        wanted = (len(C), B.shape[1])
        if D.ndim and D.shape != wanted:
            raise ValueError(
                f"StateSpace: D {list(D.shape)} must be [outputs, inputs], here {list(wanted)}, or a number"
            )
        if self.dt is not None and not self.dt > 0:
            raise ValueError(f"StateSpace(dt={self.dt}): a step is positive. Leave it out for a continuous system.")
        for name, value in zip("ABCD", (A, B, C, np.broadcast_to(D, wanted).copy()), strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def from_recurrence(
        cls,
        A: Inexact[np.ndarray, "n n"],
        B: Inexact[np.ndarray, "n ..."],
        C: Inexact[np.ndarray, "... n"],
        D: Inexact[np.ndarray, "outputs inputs"] | float = 0.0,
        dt: float = 1.0,
    ) -> StateSpace:
        """Return the system of x_t = A x_{t−1} + B u_t, y_t = C x_t + D u_t: with C A for C, and C B + D for D."""
        given = cls(A, B, C, D, dt)
        return cls(given.A, given.B, given.C @ given.A, given.C @ given.B + given.D, dt)

    @property
    def feedthrough(self) -> Inexact[np.ndarray, "outputs inputs"]:
        """D as a matrix, which it is in every system that was made."""
        return np.asarray(self.D)

    def sampled(self, dt: float, rule: str = "zoh") -> StateSpace:
        """Return the discrete system with Ā and B̄ by a rule's name (``RULES``): u_t acts from step t to t + 1.

        Raises:
            ValueError: If this system is discrete already, or there is no such rule.
        """
        if self.dt is not None:
            raise ValueError(f"StateSpace.sampled: the system is discrete already, with steps of {self.dt}")
        return StateSpace(*discretize(self.A, self.B, dt, rule), self.C, self.D, dt)

    def changed(self, T: Inexact[np.ndarray, "n r"], inverse: Inexact[np.ndarray, "r n"]) -> StateSpace:
        """Return the system of the coordinates z with x = T z and z = W x; fewer than n project it."""
        return StateSpace(inverse @ self.A @ T, inverse @ self.B, self.C @ T, self.D, self.dt)


def resolvent(
    A: Inexact[np.ndarray, "n n"], B: Inexact[np.ndarray, "n inputs"], s: Inexact[np.ndarray, " l"]
) -> Inexact[np.ndarray, "n inputs l"]:
    """Return (s_l I − A)⁻¹ B at many points, by one Schur decomposition and a triangular solve for all of them."""
    from scipy.linalg import schur  # here: SciPy is large, and a model needs none of it

    T, Z = schur(A.astype(np.complex128), output="complex")
    right = Z.conj().T @ B
    y = np.empty((*B.shape, len(s)), dtype=np.complex128)
    for i in reversed(range(len(A))):
        y[i] = (right[i, :, None] + np.tensordot(T[i, i + 1 :], y[i + 1 :], 1)) / (s - T[i, i])
    return np.asarray(np.tensordot(Z, y, 1))
