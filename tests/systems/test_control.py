"""Responses, margins, Gramians, reduction and realisation: against SciPy, python-control, and what theory says."""

from __future__ import annotations

import sys
from collections.abc import Callable

import control
import numpy as np
import pytest
from scipy import signal

from longstate import systems
from longstate.systems import StateSpace, krylov, legs, legt


def random_system(n: int = 6, inputs: int = 2, outputs: int = 3, dt: float | None = None, seed: int = 0) -> StateSpace:
    random = np.random.default_rng(seed)
    A = random.normal(size=(n, n))
    poles = np.linalg.eigvals(A)
    A = A - (poles.real.max() + 0.3) * np.eye(n) if dt is None else 0.9 * A / np.abs(poles).max()
    return StateSpace(A, random.normal(size=(n, inputs)), random.normal(size=(outputs, n)),
                      random.normal(size=(outputs, inputs)), dt)  # fmt: skip


STEPS = [None, 0.5]
WAVES = np.array([0.0, 0.1, 1.0, 3.0, 6.0])


@pytest.mark.filterwarnings("ignore:System has direct feedthrough:UserWarning")  # the impulse itself, left out by both
@pytest.mark.parametrize("dt", STEPS)
def test_responses_are_those_of_python_control(dt: float | None) -> None:
    ours = random_system(dt=dt)
    theirs = systems.to_control(ours)
    got = systems.frequency_response(ours, WAVES)
    np.testing.assert_allclose(got, np.moveaxis(theirs.frequency_response(WAVES).frdata, -1, 0), rtol=1e-10, atol=1e-12)
    times = np.arange(20) * (dt or 0.25)
    asked = times if dt is None else 20
    wanted = control.step_response(theirs, times).outputs
    np.testing.assert_allclose(systems.step_response(ours, asked), np.moveaxis(wanted, -1, 0), rtol=1e-8, atol=1e-8)
    wanted = control.impulse_response(theirs, times).outputs * (
        1 if dt is None else dt
    )  # of area 1 there, of height 1 here
    np.testing.assert_allclose(systems.impulse_response(ours, asked), np.moveaxis(wanted, -1, 0), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(np.sort_complex(systems.poles(ours)), np.sort_complex(theirs.poles()), rtol=1e-8)
    assert systems.stability_margin(ours) == pytest.approx(0.3 if dt is None else 0.1)


@pytest.mark.parametrize("dt", STEPS)
def test_there_and_back(dt: float | None) -> None:
    ours, single = random_system(dt=dt), random_system(4, 1, 1, dt)
    for system, back in (
        (ours, systems.from_control(systems.to_control(ours))),
        (ours, systems.from_scipy(systems.to_scipy(ours))),
        *(
            (single, systems.from_scipy(systems.to_scipy(single, form)))
            for form in ("TransferFunction", "ZerosPolesGain")
        ),
        (single, systems.from_control(control.tf(systems.to_control(single)))),
    ):
        assert back.dt == dt
        given, found = (systems.frequency_response(x, WAVES) for x in (system, back))
        np.testing.assert_allclose(found, given, rtol=1e-8, atol=1e-9)
    _, wanted = (signal.freqresp if dt is None else signal.dfreqresp)(systems.to_scipy(single), WAVES * (dt or 1))
    np.testing.assert_allclose(systems.frequency_response(single, WAVES)[:, 0, 0], wanted, rtol=1e-9)
    assert isinstance(systems.to_scipy(ours), signal.lti if dt is None else signal.dlti)


LOOPS = [
    ([10.0], [1, 6, 11, 6], None),
    ([1.0], [1, 1, 0], None),
    ([4.0, 2.0], [1, 2, 3, 1, 0], None),
    ([50.0], [1, 3, 3, 1], None),
    ([0.5], [1, 1], None),
    ([0.1, 0.08], [1, -1.6, 0.65], 0.1),
    ([0.3], [1, -0.5, 0.2, 0], 1.0),
]


@pytest.mark.parametrize(("numerator", "denominator", "dt"), LOOPS)
def test_margins_are_those_of_python_control(numerator: list, denominator: list, dt: float | None) -> None:
    theirs = control.tf(numerator, denominator, dt or 0)
    gain, phase, gain_at, phase_at = control.margin(theirs)
    got = systems.margins(systems.from_control(theirs))
    np.testing.assert_allclose([got.gain, got.gain_frequency], [gain, gain_at], rtol=1e-5)
    np.testing.assert_allclose([got.phase, got.phase_frequency], [np.radians(phase), phase_at], rtol=1e-5)


def test_a_gain_at_its_margin_puts_a_pole_on_the_axis() -> None:
    loop = systems.from_scipy(signal.lti([10.0], [1, 6, 11, 6]))
    assert systems.margins(loop).gain == pytest.approx(6, rel=1e-9)  # Routh: 60/10
    closed = loop.A - 6 * loop.B @ loop.C
    assert abs(np.linalg.eigvals(closed).real.max()) < 1e-9


@pytest.mark.parametrize("dt", STEPS)
def test_gramians(dt: float | None) -> None:
    system = random_system(dt=dt)
    A, B = system.A, system.B
    W = systems.controllability_gramian(system)
    residual = A @ W + W @ A.T if dt is None else A @ W @ A.T - W
    np.testing.assert_allclose(residual, -B @ B.T, atol=1e-10)
    if dt is not None:
        Q = sum(
            np.linalg.matrix_power(A.T, k) @ system.C.T @ system.C @ np.linalg.matrix_power(A, k) for k in range(300)
        )
        np.testing.assert_allclose(systems.observability_gramian(system), Q, rtol=1e-9, atol=1e-9)
    eigenvalues, V = np.linalg.eig(A)
    inside = systems.diagonal_gramian(eigenvalues, np.linalg.solve(V, B), dt)
    np.testing.assert_allclose(V @ inside @ V.conj().T, W, atol=1e-9)
    shown = systems.diagonal_gramian(eigenvalues.conj(), (system.C @ V).conj().T, dt)
    Vi = np.linalg.inv(V)
    np.testing.assert_allclose(Vi.conj().T @ shown @ Vi, systems.observability_gramian(system), atol=1e-9)


def worst(a: StateSpace, b: StateSpace) -> float:
    waves = np.concatenate([[0], np.logspace(-3, 3, 300)]) if a.dt is None else np.linspace(0, np.pi / a.dt, 300)
    error = systems.frequency_response(a, waves) - systems.frequency_response(b, waves)
    return float(np.linalg.norm(error, ord=2, axis=(1, 2)).max())


@pytest.mark.parametrize("order", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("dt", STEPS)
@pytest.mark.parametrize("reduce", [systems.balanced_truncation, systems.modal_truncation])
def test_a_reduced_system_errs_by_its_bound_at_most(reduce: Callable, dt: float | None, order: int) -> None:
    system = random_system(dt=dt)
    got = reduce(system, order)
    assert len(got.system.A) <= order and got.system.A.dtype == np.float64
    assert worst(system, got.system) <= got.bound * (1 + 1e-9) + 1e-9
    assert order == 6 or systems.stability_margin(got.system) > 0
    if reduce is systems.balanced_truncation:
        W, Q = systems.controllability_gramian(system), systems.observability_gramian(system)
        np.testing.assert_allclose(got.weights**2, np.sort(np.linalg.eigvals(W @ Q).real)[::-1], rtol=1e-7)
        if order:
            W, Q = systems.controllability_gramian(got.system), systems.observability_gramian(got.system)
            if dt is None or order == 6:  # a truncated continuous system stays balanced
                np.testing.assert_allclose(W, np.diag(got.weights[:order]), atol=1e-9)
                np.testing.assert_allclose(Q, np.diag(got.weights[:order]), atol=1e-9)
        if 0 < order < 6:
            assert worst(system, got.system) > got.weights[order] * 0.5  # no system of that order does better than σ
    else:
        poles = systems.poles(system)
        for pole in systems.poles(got.system):
            assert np.abs(poles - pole).min() < 1e-9


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 3)])
def test_a_system_is_found_again_from_its_taps(inputs: int, outputs: int) -> None:
    system = random_system(5, inputs, outputs, 1.0)
    taps = systems.impulse_response(system, 40)
    got = systems.eigensystem_realization(taps[:, 0, 0] if inputs == 1 else taps)
    assert len(got.system.A) == 5 and got.singular_values[5] < 1e-12 * got.singular_values[0]
    np.testing.assert_allclose(
        np.sort_complex(systems.poles(got.system)), np.sort_complex(systems.poles(system)), atol=1e-7
    )
    np.testing.assert_allclose(
        systems.impulse_response(got.system, 80), systems.impulse_response(system, 80), atol=1e-9
    )
    fewer = systems.eigensystem_realization(taps, order=3).system
    assert len(fewer.A) == 3 and np.abs(systems.impulse_response(fewer, 40) - taps).max() > 1e-6


@pytest.mark.parametrize("gamma", [1.0, 0.95])
@pytest.mark.parametrize("n", [1, 2, 33, 256])
def test_any_taps_are_a_diagonal_system(n: int, gamma: float) -> None:
    taps = np.random.default_rng(0).normal(size=n) * gamma ** np.arange(n)
    A, B, C = systems.toeplitz_to_diagonal(taps, gamma)
    got = krylov(A, B, C, 2 * n + 1)
    np.testing.assert_allclose(got[:n], taps, atol=1e-12)
    np.testing.assert_allclose(got[n + 1 :], taps * gamma ** (n + 1), atol=1e-12)  # periodic beyond


def test_a_recurrence_of_ours_as_theirs() -> None:
    A, B = systems.bilinear(*legs(5), 0.1)
    C, D, u = np.arange(5.0), 0.7, np.random.default_rng(0).normal(size=30)
    x, wanted = np.zeros(5), []
    for u_t in u:
        x = A @ x + B * u_t
        wanted.append(C @ x + D * u_t)
    theirs = systems.to_scipy(StateSpace.from_recurrence(A, B, C, D))
    np.testing.assert_allclose(signal.dlsim(theirs, u)[1][:, 0], wanted, rtol=1e-12, atol=1e-12)
    sampled = StateSpace(*legt(4), np.ones(4)).sampled(0.1)
    assert sampled.dt == 0.1 and abs(systems.poles(sampled)).max() < 1


def test_without_python_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "control", None)
    with pytest.raises(ImportError, match=r"longstate\[control\]"):
        systems.to_control(random_system())


UNSTABLE = StateSpace(np.eye(2), np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StateSpace(np.eye(2), np.ones((2, 1, 1)), np.ones(2)), "must be"),
        (lambda: StateSpace(np.eye(2), np.ones(2), np.ones(2), np.ones((2, 2))), "outputs, inputs"),
        (lambda: StateSpace(np.eye(2), np.ones(2), np.ones(2), dt=0.0), "positive"),
        (lambda: random_system(dt=1.0).sampled(1.0), "discrete already"),
        (lambda: systems.controllability_gramian(UNSTABLE), "unstable"),
        (lambda: systems.modal_truncation(UNSTABLE, 1), "unstable"),
        (lambda: systems.diagonal_gramian(np.ones(2), np.ones(2)), "inside"),
        (lambda: systems.balanced_truncation(random_system(), 7), "from 0 to 6"),
        (lambda: systems.margins(random_system()), "one input"),
        (lambda: systems.step_response(UNSTABLE, 5), "continuous"),
        (lambda: systems.impulse_response(random_system(dt=1.0), WAVES), "discrete"),
        (lambda: systems.eigensystem_realization(np.ones(2)), "3 or more"),
        (lambda: systems.eigensystem_realization(np.ones(9), order=4), "show 1"),
        (lambda: systems.toeplitz_to_diagonal(np.ones(3), 0.0), "gamma"),
        (lambda: systems.to_scipy(random_system(), "ZerosPolesGain"), "one input"),
        (lambda: systems.from_scipy(3), "int"),
        (lambda: systems.from_control(3), "int"),
        (lambda: systems.from_control(control.tf([1], [1, 1], None)), "neither"),
        (lambda: systems.to_control(StateSpace(1j * np.eye(1), np.ones(1), np.ones(1))), "real"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
