"""Matrices A with a structure, and what it makes fast: products, resolvents, and kernels K_l = C A^l B.

The classes are alike: ``apply(x)`` is A x, ``dense()`` the matrix, ``transfer(B, C, s)`` is C (s I − A)⁻¹ B, and
``kernel(B, C, length)`` the kernel by the structure's own algorithm. The continuous ones have ``sampled(B, dt, rule)``,
which returns the discrete A of the same structure, and its input vector. ``krylov`` and ``step`` are for all of them.
A kernel's system is x_t = A x_{t−1} + B u_t, y_t = C x_t, with one input and one output; C is not conjugated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._errors import check_choice
from .._shapes import Float, Inexact
from .discretization import RULES, discretize
from .state_space import resolvent

Vector = Inexact[np.ndarray, " n"]
# The rules that make a DPLR matrix another one, with how much of a step each takes implicitly.
IMPLICIT = {"euler": 0.0, "backward_euler": 1.0, "bilinear": 0.5}


@dataclass(frozen=True, eq=False)
class Dense:
    """Any matrix.

    Args:
        A: The matrix.
    """

    A: Inexact[np.ndarray, "n n"]

    def apply(self, x: Inexact[np.ndarray, "*b n"]) -> Inexact[np.ndarray, "*b n"]:
        """Return A x."""
        return np.asarray(x @ self.A.T)

    def dense(self) -> Inexact[np.ndarray, "n n"]:
        """Return A."""
        return self.A

    def transfer(self, B: Vector, C: Vector, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, " l"]:
        """Return C (s I − A)⁻¹ B at many points."""
        return np.asarray(C @ resolvent(self.A, B[:, None], s)[:, 0])

    def kernel(self, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
        """Return C A^l B, l < length, with [B, A B, A² B, …] doubled by A, A², A⁴, …: log₂ length products."""
        columns, power = B[:, None], self.A
        while columns.shape[1] < length:
            columns, power = np.hstack([columns, power @ columns]), power @ power
        return np.asarray(C @ columns[:, :length])

    def sampled(self, B: Vector, dt: float, rule: str = "zoh") -> tuple[Dense, Vector]:
        """Return Ā and B̄ by a rule's name in ``RULES``."""
        A, B = discretize(self.A, B, dt, rule)
        return Dense(A), B


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal matrix (S4D, S5).

    Args:
        eigenvalues: The diagonal; of a real system both of each conjugate pair.
    """

    eigenvalues: Inexact[np.ndarray, " n"]

    def apply(self, x: Inexact[np.ndarray, "*b n"]) -> Inexact[np.ndarray, "*b n"]:
        """Return A x."""
        return np.asarray(self.eigenvalues * x)

    def dense(self) -> Inexact[np.ndarray, "n n"]:
        """Return A."""
        return np.diag(self.eigenvalues)

    def transfer(self, B: Vector, C: Vector, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, " l"]:
        """Return C (s I − A)⁻¹ B at many points: a Cauchy sum."""
        return np.asarray((1 / (s[:, None] - self.eigenvalues)) @ (C * B))

    def kernel(self, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
        """Return C A^l B, l < length: a Vandermonde product, whose powers factor, λ^{wi+j} = λ^{wi} λ^j.

        There are 2√length powers of each eigenvalue, and one matrix product.
        """
        width = max(1, int(np.ceil(np.sqrt(length))))
        fine = _powers(self.eigenvalues, width)
        coarse = _powers(fine[-1] * self.eigenvalues, -(-length // width))
        return np.asarray((coarse * (C * B) @ fine.T).reshape(-1)[:length])

    def sampled(self, B: Vector, dt: float, rule: str = "zoh") -> tuple[Diagonal, Vector]:
        """Return Ā and B̄ by a rule's name in ``RULES``."""
        eigenvalues, B = discretize(self.eigenvalues, B, dt, rule)
        return Diagonal(eigenvalues), B


@dataclass(frozen=True, eq=False)
class DPLR:
    """A diagonal matrix minus one of low rank, A = Λ − P Q* (S4).

    Args:
        eigenvalues: Λ; of a real system both of each conjugate pair (``NPLR.whole``).
        P: ``[n r]``, of any rank.
        Q: ``[n r]``; P when absent.

    Source:
        Gu et al., arXiv:2111.00396, appendix C.
    """

    eigenvalues: Inexact[np.ndarray, " n"]
    P: Inexact[np.ndarray, "n r"]
    Q: Inexact[np.ndarray, "n r"] | None = None

    @property
    def adjoint(self) -> Inexact[np.ndarray, "r n"]:
        """Q*."""
        return np.asarray((self.P if self.Q is None else self.Q).conj().T)

    def apply(self, x: Inexact[np.ndarray, "*b n"]) -> Inexact[np.ndarray, "*b n"]:
        """Return A x, in 2 n r products."""
        return np.asarray(self.eigenvalues * x - x @ self.adjoint.T @ self.P.T)

    def dense(self) -> Inexact[np.ndarray, "n n"]:
        """Return A."""
        return np.asarray(np.diag(self.eigenvalues) - self.P @ self.adjoint)

    def transfer(self, B: Vector, C: Vector, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, " l"]:
        """Return C (s I − A)⁻¹ B at many points by Woodbury's identity: (1 + r)² Cauchy sums.

        k_CB − k_CP (I + k_QP)⁻¹ k_QB,    k_vw(s) = Σ_n v_n w_n / (s − λ_n)
        """
        rank = self.P.shape[1]
        cauchy = 1 / (s[:, None] - self.eigenvalues)
        left, right = np.vstack([C, self.adjoint]), np.column_stack([B, self.P])
        sums = (cauchy @ (left.T[:, :, None] * right[:, None, :]).reshape(len(B), -1)).reshape(-1, rank + 1, rank + 1)
        middle = np.eye(rank) + sums[:, 1:, 1:]
        correction = sums[:, :1, 1:] @ np.linalg.solve(middle, sums[:, 1:, :1])
        return np.asarray(sums[:, 0, 0] - correction[:, 0, 0])

    def kernel(self, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
        """Return C A^l B, l < length, from the transfer function at the nodes of a Fourier transform.

        The product C A^length takes log₂ length products of dense matrices once; the nodes take none.
        """
        return _kernel_from_nodes(self, B, C, length)

    def sampled(self, B: Vector, dt: float, rule: str = "bilinear") -> tuple[DPLR, Vector]:
        """Return Ā and B̄ of the same rank, by Woodbury's identity: no matrix of n × n is made, so a step is 2 n r.

        With E = 1/(1 − αΔΛ) and M = I + αΔ Q* E P,

            Ā = E (1 + (1−α)ΔΛ) − Δ E P M⁻¹ Q* E,    B̄ = Δ (E − αΔ E P M⁻¹ Q* E) B

        Raises:
            ValueError: If the rule is none of "euler", "backward_euler" and "bilinear": e^{ΔA} has not that structure.
        """
        check_choice("DPLR.sampled", "rule", rule, IMPLICIT)
        part = IMPLICIT[rule] * dt
        E = 1 / (1 - part * self.eigenvalues)
        P, adjoint = E[:, None] * self.P, self.adjoint * E
        P = P @ np.linalg.inv(np.eye(self.P.shape[1]) + part * self.adjoint @ P)
        eigenvalues = E * (1 + (dt - part) * self.eigenvalues)
        return DPLR(eigenvalues, dt * P, adjoint.conj().T), dt * (E * B - part * P @ (adjoint @ B))


@dataclass(frozen=True, eq=False)
class Companion:
    """A companion matrix: states move on by one, and the last returns to all (SpaceTime).

    A e_i = e_{i+1}, A e_{n−1} = a; its eigenvalues are the roots of zⁿ − Σ a_i zⁱ.

    Args:
        column: a.

    Source:
        Zhang et al., arXiv:2303.09489.
    """

    column: Inexact[np.ndarray, " n"]

    def apply(self, x: Inexact[np.ndarray, "*b n"]) -> Inexact[np.ndarray, "*b n"]:
        """Return A x."""
        return np.asarray(Shift(len(self.column)).apply(x) + x[..., -1:] * self.column)

    def dense(self) -> Inexact[np.ndarray, "n n"]:
        """Return A."""
        A = np.eye(len(self.column), k=-1).astype(self.column.dtype)
        A[:, -1] += self.column
        return A

    def transfer(self, B: Vector, C: Vector, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, " l"]:
        """Return C (s I − A)⁻¹ B at many points: four polynomials in 1/s.

        q(C, B) + q(C, a) q(e, B) / (1 − q(e, a)),    q(v, w) = v (s I − shift)⁻¹ w,    e the last unit vector
        """
        return self._resolved(B, C, lambda taps: np.asarray(np.polyval(taps[::-1], 1 / s) / s))

    def kernel(self, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
        """Return C A^l B, l < length, with the polynomials evaluated at the nodes of a transform by transforms."""
        return _kernel_from_nodes(self, B, C, length)

    def at_nodes(self, B: Vector, C: Vector, length: int, radius: float) -> Inexact[np.ndarray, " l"]:
        """Return the transfer function at s = radius · e^{2πik/length}, in O((n + length) log (n + length))."""
        nodes = radius * _roots_of_unity(length)

        def evaluated(taps: np.ndarray) -> np.ndarray:
            weighted = taps * radius ** -np.arange(len(taps), dtype=np.float64)
            # The nodes' powers repeat after `length`, so that later taps fall on earlier ones.
            folded = np.pad(weighted, (0, -len(taps) % length)).reshape(-1, length).sum(0)
            return np.asarray(np.fft.fft(folded) / nodes)

        return self._resolved(B, C, evaluated)

    def _resolved(
        self,
        B: Vector,
        C: Vector,
        evaluated: Callable[[np.ndarray], np.ndarray],
    ) -> Inexact[np.ndarray, " l"]:
        n = len(self.column)
        cb, ca, eb, ea = (evaluated(Shift(n).kernel(w, v, n)) for v in (C, np.eye(n)[-1]) for w in (B, self.column))
        return np.asarray(cb + ca * eb / (1 - ea))


@dataclass(frozen=True, eq=False)
class Shift:
    """The matrix that moves states on by one, and forgets the last (H3).

    Args:
        n: States.
    """

    n: int

    def apply(self, x: Inexact[np.ndarray, "*b n"]) -> Inexact[np.ndarray, "*b n"]:
        """Return A x."""
        return np.concatenate([np.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)

    def dense(self) -> Float[np.ndarray, "n n"]:
        """Return A."""
        return np.eye(self.n, k=-1)

    def transfer(self, B: Vector, C: Vector, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, " l"]:
        """Return C (s I − A)⁻¹ B at many points: a polynomial in 1/s."""
        return np.asarray(np.polyval(self.kernel(B, C, self.n)[::-1], 1 / s) / s)

    def kernel(self, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
        """Return C A^l B = Σ_i C_{i+l} B_i, l < length: a correlation by transforms, and 0 from l = n on."""
        size = 2 * self.n
        products = np.fft.ifft(np.fft.fft(C, size) * np.fft.fft(B[::-1], size))[self.n - 1 : -1]
        taps = products if np.iscomplexobj(B) or np.iscomplexobj(C) else products.real
        return np.pad(taps, (0, max(0, length - self.n)))[:length]


@dataclass(frozen=True, eq=False)
class Oscillators:
    """Independent pairs of states, a matrix of 2 × 2 for each (LinOSS); states are ordered (z_1 … z_m, y_1 … y_m).

    Args:
        blocks: One matrix for each pair, from (z, y) to (z, y).

    Source:
        Rusch and Rus, arXiv:2410.03943.
    """

    blocks: Inexact[np.ndarray, "m 2 2"]

    @classmethod
    def undamped(cls, stiffness: Inexact[np.ndarray, " m"]) -> Oscillators:
        """Return the oscillators y″ = −k y with z = y′, for stiffnesses k: z′ = −k y, y′ = z."""
        blocks = np.zeros((len(stiffness), 2, 2), dtype=stiffness.dtype)
        blocks[:, 0, 1], blocks[:, 1, 0] = -stiffness, 1
        return cls(blocks)

    def apply(self, x: Inexact[np.ndarray, "*b n"]) -> Inexact[np.ndarray, "*b n"]:
        """Return A x."""
        (a, b), (c, d) = self.blocks.transpose(1, 2, 0)
        z, y = np.split(x, 2, axis=-1)
        return np.concatenate([a * z + b * y, c * z + d * y], axis=-1)

    def dense(self) -> Inexact[np.ndarray, "n n"]:
        """Return A."""
        return np.block([[np.diag(entry) for entry in row] for row in self.blocks.transpose(1, 2, 0)])

    def transfer(self, B: Vector, C: Vector, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, " l"]:
        """Return C (s I − A)⁻¹ B at many points, with every 2 × 2 inverse written out."""
        (a, b), (c, d) = self.blocks.transpose(1, 2, 0)
        (bz, by), (cz, cy), r = np.split(B, 2), np.split(C, 2), s[:, None]
        determinant = (r - a) * (r - d) - b * c
        return np.asarray(((cz * ((r - d) * bz + b * by) + cy * (c * bz + (r - a) * by)) / determinant).sum(-1))

    def kernel(self, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
        """Return C A^l B, l < length, with √length powers of the blocks on B and as many on C.

        No eigenvalue is taken, so that a block with a double one needs no care.
        """
        width = max(1, int(np.ceil(np.sqrt(length))))
        right, left = [B], [C]
        while len(right) < width:
            right.append(self.apply(right[-1]))
        # A row vector times A^width is the transposed blocks' power on it.
        turned = Oscillators(np.linalg.matrix_power(self.blocks, width).transpose(0, 2, 1))
        while len(left) * width < length:
            left.append(turned.apply(left[-1]))
        return np.asarray((np.stack(left) @ np.stack(right).T).reshape(-1)[:length])

    def sampled(self, B: Vector, dt: float, rule: str = "implicit_explicit") -> tuple[Oscillators, Vector]:
        """Return Ā and B̄ by "implicit" (the backward Euler rule), "implicit_explicit", or a rule's name in ``RULES``.

        The implicit rule damps; the implicit-explicit one, z first and then y by the new z, keeps the energy of an
        undamped oscillator bounded for Δ² k < 4.
        """
        check_choice("Oscillators.sampled", "rule", rule, ("implicit", "implicit_explicit", *RULES))
        pairs = np.stack(np.split(B, 2), axis=-1)
        if rule == "implicit_explicit":
            first, second = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
            then = np.eye(2) + dt * second @ self.blocks
            moved = then @ (np.eye(2) + dt * first @ self.blocks)
            drive = dt * ((then @ (pairs @ first)[..., None])[..., 0] + pairs @ second)
        else:
            name = "backward_euler" if rule == "implicit" else rule
            found = [discretize(block, pair, dt, name) for block, pair in zip(self.blocks, pairs, strict=True)]
            moved, drive = (np.stack(x) for x in zip(*found, strict=True))
        return Oscillators(moved), drive.T.reshape(-1)


Structure = Dense | Diagonal | DPLR | Companion | Shift | Oscillators


def krylov(A: Structure, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
    """Return C A^l B, l < length, as it is defined: one product with A for each tap."""
    taps, x = [], B
    for _ in range(length):
        taps.append(C @ x)
        x = A.apply(x)
    return np.array(taps)


def step(
    A: Structure,
    B: Vector,
    C: Vector,
    x: Inexact[np.ndarray, "*b n"],
    u: Inexact[np.ndarray, "*b"],
) -> tuple[Inexact[np.ndarray, "*b"], Inexact[np.ndarray, "*b n"]]:
    """Return y_t = C x_t and the new state x_t = A x_{t−1} + B u_t, of one sequence or of several."""
    x = A.apply(x) + u[..., None] * B
    return np.asarray(x @ C), x


def _kernel_from_nodes(A: DPLR | Companion, B: Vector, C: Vector, length: int) -> Inexact[np.ndarray, " l"]:
    # On a circle of radius ρ, Σ_l K_l s^{−l} = s C̃ (s I − A)⁻¹ B with C̃ = C (I − (A/ρ)^L). ρ is a little above 1, where
    # no pole of a stable system lies, even of one that does not decay (LegT); rounding grows by ρ^L = e at most.
    radius = float(np.exp(1 / length))
    nodes, matrix = radius * _roots_of_unity(length), A.dense()
    rest = C - C @ np.linalg.matrix_power(matrix, length) / np.e
    values = A.at_nodes(B, rest, length, radius) if isinstance(A, Companion) else A.transfer(B, rest, nodes)
    taps = np.fft.ifft(nodes * values) * np.exp(np.arange(length) / length)
    return np.asarray(taps if any(np.iscomplexobj(x) for x in (B, C, matrix)) else taps.real)


def _roots_of_unity(length: int) -> Inexact[np.ndarray, " l"]:
    return np.exp(2j * np.pi * np.arange(length) / length)


def _powers(z: Inexact[np.ndarray, " n"], count: int) -> Inexact[np.ndarray, "l n"]:
    """Return z⁰ … z^{count−1}, by doubling: no logarithm, which has no value at z = 0."""
    rows, power = np.ones((1, len(z)), dtype=z.dtype), z
    while len(rows) < count:
        rows, power = np.vstack([rows, rows * power]), power * power
    return rows[:count]
