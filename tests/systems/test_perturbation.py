"""LegS, perturbed: what is said of its eigenvectors, of the size of the perturbation and of the transfer function."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longstate.systems import legs, legs_normal, perturbed_legs


def responses(A: np.ndarray, B: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return (s − A)⁻¹ B, a row for each s: the transfer functions to every state."""
    return np.stack([np.linalg.solve(at * np.eye(len(A)) - A, B.astype(complex)) for at in s])


def relative(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return how far rows are apart: the largest error of any read-out C (s − A)⁻¹ B, against the largest response."""
    return np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


@pytest.mark.parametrize("feedback", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("n", [4, 16, 64, 128])
def test_it_is_diagonalised_by_a_basis_as_good_as_promised(n: int, feedback: float) -> None:
    A, B = legs(n)
    system = perturbed_legs(n, feedback)
    V = np.hstack([system.basis, system.basis.conj()])
    values = np.concatenate([system.eigenvalues, system.eigenvalues.conj()])
    wanted = A + system.perturbation
    atol = 1e-10
    np.testing.assert_allclose(V * values @ np.linalg.inv(V), wanted, atol=atol)
    np.testing.assert_allclose(2 * (system.basis * system.eigenvalues @ system.inverse).real, wanted, atol=atol)
    np.testing.assert_allclose(2 * (system.basis @ system.B).real, (1 - feedback) * B, atol=1e-11 * n)
    np.testing.assert_allclose(system.inverse @ V, np.eye(n)[: n // 2], atol=1e-11)
    assert np.linalg.cond(V) <= (1 - feedback) / feedback * (1 + 1e-9)
    assert np.linalg.norm(system.perturbation, 2) == pytest.approx(feedback * n**2)
    assert feedback * n**2 < 1.6 * feedback * np.linalg.norm(A, 2)
    assert system.eigenvalues.real.max() <= -0.5 + 1e-9 and (system.eigenvalues.imag > 0).all()
    assert (np.diff(system.eigenvalues.imag) > 0).all() and np.allclose(np.linalg.norm(V, axis=0), 1)
    np.testing.assert_array_equal(perturbed_legs(n, feedback).basis, system.basis)


def test_legs_itself_has_no_such_basis() -> None:
    """The negative control: what the condition number is without the perturbation."""
    assert np.linalg.cond(np.linalg.eig(legs(16)[0])[1]) > 1e9


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("feedback", [0.02, 0.1, 0.5])
def test_its_transfer_function_is_that_of_legs_times_a_factor_near_one(n: int, feedback: float) -> None:
    A, B = legs(n)
    s = 1j * np.concatenate([[0], np.logspace(-2, 2 + 2 * math.log10(n), 200)])
    system = perturbed_legs(n, feedback)
    V = np.hstack([system.basis, system.basis.conj()])
    modes = np.concatenate([system.eigenvalues, system.eigenvalues.conj()])
    got = (np.concatenate([system.B, system.B.conj()]) / (s[:, None] - modes)) @ V.T
    k = np.arange(n)
    Pi = np.prod((s[:, None] - k) / (s[:, None] + k + 1), axis=1)
    rho = feedback / (1 - feedback)
    wanted = responses(A, B, s)
    # An entry of (s − A)⁻¹ B is R_n Π_n(s) / (s + n + 1), with the product of the first n factors.
    np.testing.assert_allclose(wanted[:, -1], math.sqrt(2 * n - 1) * Pi / (s - n + 1), atol=1e-10)
    np.testing.assert_allclose(got, wanted / (1 + rho * Pi)[:, None], atol=1e-10 * np.abs(wanted).max())
    if feedback < 0.5:
        assert 0.5 * rho / (1 - rho) < relative(got, wanted).max() <= rho / (1 - rho) + 1e-9


def test_a_small_perturbation_keeps_the_published_bound() -> None:
    """|C (G′ − G)| ≤ (2 ln n + 4) ‖E‖ for |C| = 1, where ‖E‖ is small."""
    for n in (8, 16, 32):
        A, B = legs(n)
        E = 0.1 / n**2 * np.outer(B, B)
        s = 1j * np.logspace(-2, 4, 200)
        assert np.linalg.norm(E, 2) == pytest.approx(0.1)
        error = np.linalg.norm(responses(A + E, B, s) - responses(A, B, s), axis=1).max()
        assert 0 < error <= (2 * math.log(n) + 4) * 0.1


def test_the_spikes_of_the_normal_part_and_none_here() -> None:
    """S4D-LegS errs by as much as there is, or more, at frequencies that grow as n²; the perturbed system nowhere."""
    for n in (8, 16, 32):
        s = 1j * n**2 * np.linspace(0.01, 2, 400)
        A, B = legs(n)
        wanted = responses(A, B, s)
        spikes = relative(responses(legs_normal(n)[0], B / 2, s), wanted)
        assert spikes.max() > 10 and 0.2 < abs(s[spikes.argmax()]) / n**2 < 0.5
        system = perturbed_legs(n)
        assert relative(responses(A + system.perturbation, 0.9 * B, s), wanted).max() <= 0.1 / 0.8 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [((7,), "n=8"), ((0,), "n=2"), ((8, 0.0), "0.1"), ((8, 0.6), "up to 0.5"), ((8, 1e-4), "real modes")],
)
def test_what_cannot_be_is_refused(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturbed_legs(*options)
