"""HiPPO and discretisation against what is known of them, and against SciPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.signal import cont2discrete

from longstate.systems import bilinear, diagonal_modes, legs, legs_normal, zoh


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_the_spectrum_of_legs(n: int) -> None:
    A, B = legs(n)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(A).real), -np.arange(n, 0, -1.0), rtol=1e-6)
    assert A.shape == (n, n) and B.shape == (n,)
    np.testing.assert_allclose(B, [math.sqrt(2 * k + 1) for k in range(n)])


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_is_normal_but_for_rank_one(n: int) -> None:
    A, _ = legs(n)
    N, B = legs_normal(n)
    np.testing.assert_allclose(N @ N.T, N.T @ N, atol=1e-9 * n**3)
    np.testing.assert_allclose(N + N.T, -np.eye(n), atol=1e-12 * n)
    assert np.linalg.matrix_rank(N - A) == 1
    np.testing.assert_allclose(N - A, np.outer(B, B) / 2, atol=1e-12 * n)
    assert not np.allclose(A @ A.T, A.T @ A), "LegS itself is not normal"


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_modes_rebuild_their_system(n: int) -> None:
    A, B = legs_normal(n)
    modes = diagonal_modes(A, B)
    V = modes.basis
    assert V.shape == (n, n // 2) and (modes.eigenvalues.imag > 0).all() and (np.diff(modes.eigenvalues.imag) > 0).all()
    np.testing.assert_allclose(modes.eigenvalues.real, -0.5, atol=1e-9)
    np.testing.assert_allclose(2 * (V * modes.eigenvalues @ V.conj().T).real, A, atol=1e-9 * n)
    np.testing.assert_allclose(2 * (V @ modes.B).real, B, atol=1e-9 * n)


def test_a_system_without_conjugate_pairs_is_refused() -> None:
    for A, B in (legs(4), legs_normal(3)):
        with pytest.raises(ValueError, match="skew"):
            diagonal_modes(A, B)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize(("rule", "name"), [(zoh, "zoh"), (bilinear, "bilinear")])
@pytest.mark.parametrize("dt", [1e-3, 0.1, 2.0])
def test_discretisation_is_scipys(rule, name: str, dt: float, inputs: int) -> None:
    random = np.random.default_rng(0)
    A, B = random.normal(size=(5, 5)) - 2 * np.eye(5), random.normal(size=(5, inputs))
    if name == "bilinear":  # SciPy holds the input at both ends of a step, which gives the same A and B
        wanted = cont2discrete((A, B, np.zeros((1, 5)), np.zeros((1, inputs))), dt, "bilinear")
    else:
        wanted = cont2discrete((A, B, np.zeros((1, 5)), np.zeros((1, inputs))), dt, "zoh")
    got = rule(A, B, dt)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-10, atol=1e-12)


def test_a_vector_of_inputs_stays_a_vector_and_a_singular_system_is_held() -> None:
    A, B = np.zeros((2, 2)), np.array([1.0, 2.0])
    decay, gain = zoh(A, B, 0.5)
    np.testing.assert_allclose(decay, np.eye(2))
    np.testing.assert_allclose(gain, B / 2)
    assert bilinear(A, B, 0.5)[1].shape == (2,)


def after(rule, steps: int) -> float:
    """Return x(1) of x′ = A x + B cos(3t) by steps that take the input at their middles."""
    A, B = np.array([[0.0, 1.0], [-4.0, -0.5]]), np.array([0.0, 1.0])
    dt = 1 / steps
    decay, gain = rule(A, B, dt)
    x = np.array([1.0, 0.0])
    for i in range(steps):
        x = decay @ x + gain * math.cos(3 * (i + 0.5) * dt)
    return float(x[0])


def test_orders() -> None:
    """Bilinear is of second order; a held input makes zero-order hold exact, which bilinear is not."""
    exact = after(zoh, 20_000)
    errors = [abs(after(bilinear, n) - exact) for n in (20, 40, 80)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(1.9 < order < 2.1 for order in orders), orders
    A, B = np.array([[-1.0]]), np.array([1.0])
    for steps in (1, 7):
        x = 0.0
        for _ in range(steps):
            decay, gain = zoh(A, B, 2 / steps)
            x = decay[0, 0] * x + gain[0]
        assert abs(x - (1 - math.exp(-2))) < 1e-14
    assert abs(bilinear(A, B, 2.0)[1][0] - (1 - math.exp(-2))) > 0.1
