"""Rules of discretisation: their orders, diagonals as matrices, events, and LegS' own steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.linalg
from scipy.integrate import solve_ivp
from scipy.signal import cont2discrete

from longstate.systems import (
    RULES,
    asynchronous,
    bilinear,
    discretize,
    generalised_bilinear,
    legs,
    scale_invariant_step,
)
from longstate.systems.discretization import matrix_exponential, phi

A = np.array([[-1.0, 3.0, 0.5], [-2.0, -0.5, 1.0], [0.3, 0.0, -2.0]])
B = np.array([1.0, -0.5, 2.0])
ORDERS = {"euler": 1, "backward_euler": 1, "bilinear": 2, "generalised_bilinear": 2, "zoh": None, "dirac": None}


@pytest.mark.parametrize("rule", ORDERS)
def test_the_error_of_one_step_falls_with_its_order_and_one(rule: str) -> None:
    def error(dt: float) -> float:
        return float(np.abs(RULES[rule](A, B, dt)[0] - scipy.linalg.expm(dt * A)).max())

    errors = [error(dt) for dt in (0.02, 0.01, 0.005)]
    order = ORDERS[rule]
    if order is None:
        assert all(error < 1e-14 for error in errors)
    else:
        orders = [math.log2(a / b) - 1 for a, b in itertools.pairwise(errors)]
        assert all(abs(found - order) < 0.1 for found in orders), orders


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_generalised_rule_is_scipys(alpha: float) -> None:
    wanted = cont2discrete((A, B[:, None], np.zeros((1, 3)), np.zeros((1, 1))), 0.3, "gbt", alpha=alpha)
    got = generalised_bilinear(A, B, 0.3, alpha)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(got[1], wanted[1][:, 0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("columns", [(), (2,)])
@pytest.mark.parametrize("rule", RULES)
def test_a_diagonal_is_a_matrix(rule: str, columns: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    poles = np.array([-0.5 + 3j, -2.0, 0.0, 1e-9j, -1e-6])
    drive = random.normal(size=(5, *columns)) + 1j * random.normal(size=(5, *columns))
    diagonal, dense = discretize(poles, drive, 0.1, rule), discretize(np.diag(poles), drive, 0.1, rule)
    np.testing.assert_allclose(np.diag(diagonal[0]), dense[0], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(diagonal[1], dense[1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("z", [0.0, 1e-300, 1e-12, -3e-6, 1e-3j, -1e-9 + 1e-5j, -40.0, -1 + 20j])
def test_phi_to_all_digits(z: complex) -> None:
    with mpmath.workdps(400):
        wanted = complex(mpmath.expm1(z) / z) if z else 1
    assert abs(phi(np.array([z]))[0] - wanted) < 4e-16 * abs(wanted)


@pytest.mark.parametrize("rule", RULES)
def test_an_integrator_adds_up(rule: str) -> None:
    """A = 0 and the nilpotent A of a double integrator: singular, and every rule knows the first exactly."""
    got = discretize(np.zeros((2, 2)), B[:2], 0.25, rule)
    np.testing.assert_array_equal(got[0], np.eye(2))
    np.testing.assert_array_equal(got[1], B[:2] * (1 if rule == "dirac" else 0.25))
    double = np.array([[0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(discretize(double, np.array([0.0, 1.0]), 0.5, "zoh")[1], [0.125, 0.5], rtol=1e-15)


@pytest.mark.parametrize("diagonal", [True, False])
def test_events_at_any_time(diagonal: bool) -> None:
    """Between events the state decays as e^{At}, and each adds what a held input of length δ adds."""
    system = np.array([-0.5, -1.5, -0.1]) if diagonal else A
    elapsed = np.array([1.0, 0.2, 7.0, 0.0])
    decays, gain = asynchronous(system, B, 0.3, elapsed)
    matrix = np.diag(system) if diagonal else system
    x = wanted = np.zeros(3)
    for decay, gap in zip(decays, elapsed, strict=True):
        x = (decay * x if diagonal else decay @ x) + gain
        if gap:
            wanted = solve_ivp(
                lambda _, x: matrix @ x, (0, 0.3 * gap), wanted, method="DOP853", rtol=1e-12, atol=1e-13
            ).y[:, -1]
        wanted = (
            wanted
            + solve_ivp(lambda _, x: matrix @ x + B, (0, 0.3), 0 * x, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        )
    np.testing.assert_allclose(x, wanted, rtol=1e-9)


def legs_error(rule: str, steps: int) -> float:
    """Return the error of LegS' coefficients of a ramp after steps over [1, 2]; those of u(s) = s are known."""
    system, drive = legs(4)
    exact = np.array([0.5, 0.5 / math.sqrt(3), 0, 0])  # of s on [0, t], divided by t
    x, dt = exact.copy(), 1 / steps
    for k in range(steps, 2 * steps):
        decay, gain = scale_invariant_step(system, drive, k, rule)
        x = decay @ x + gain * (k + 0.5) * dt
    return float(np.abs(x - 2 * exact).max())


def test_steps_of_legs_follow_its_equation() -> None:
    for rule in ("euler", "backward_euler", "bilinear", "zoh"):
        errors = [legs_error(rule, steps) for steps in (50, 100, 200)]
        orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        # A/k is the slope where a step begins: only the exact solution of a step does better than first order.
        assert all(abs(order - (2 if rule == "zoh" else 1)) < 0.15 for order in orders), (rule, orders)


def test_a_step_of_legs_on_the_scale_of_logarithms() -> None:
    system, drive = legs(6)
    decay, gain = scale_invariant_step(system, drive, 3, "zoh")
    exact = solve_ivp(lambda t, x: (system @ x + drive) / t, (3, 4), drive, method="DOP853", rtol=1e-12, atol=1e-13).y[
        :, -1
    ]
    np.testing.assert_allclose(decay @ drive + gain, exact, atol=1e-9)
    for rule in ("euler", "backward_euler", "bilinear"):
        wanted = discretize(system / 3, drive / 3, 1.0, rule)
        for got, known in zip(scale_invariant_step(system, drive, 3, rule), wanted, strict=True):
            np.testing.assert_allclose(got, known, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: discretize(A, B, 0.1, "tustin"), "rule='tustin'"),
        (lambda: bilinear(A[:2], B[:2], 0.1), "must be"),
        (lambda: generalised_bilinear(A, B, 0.1, 1.5), "from 0 to 1"),
        (lambda: scale_invariant_step(A, B, 0), "from 1"),
        (lambda: scale_invariant_step(A, B, 1, "dirac"), "dirac"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("norm", [1e-9, 1e-3, 0.02, 0.045, 0.05, 0.2, 1.0, 3.0])
def test_exponentials_are_exact_to_rounding_at_every_norm(norm: float) -> None:
    """PyTorch's by itself errs by 1e-11 at norms a little below 0.05."""
    A = np.random.default_rng(0).normal(size=(20, 6, 6))
    A *= norm / np.abs(A).sum(-2).max(-1)[:, None, None]
    for given in (A, A + 1j * A.transpose(0, 2, 1)):
        wanted = np.stack([scipy.linalg.expm(a) for a in given])
        for got in (matrix_exponential(given), np.stack([matrix_exponential(a) for a in given])):
            assert np.abs(got - wanted).max() < 1e-14 * np.exp(norm)
