"""Structured matrices: each against its dense matrix, and each kernel against powers of it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from longstate.systems import nplr, structured
from longstate.systems.discretization import discretize
from longstate.systems.structured import DPLR, Companion, Dense, Diagonal, Oscillators, Shift, Structure, krylov, step

N = 8


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def mixed(*shape: int, seed: int = 0) -> np.ndarray:
    return random(*shape, seed=seed) + 1j * random(*shape, seed=seed + 1)


def dplr(rank: int, measure: str = "") -> DPLR:
    if measure:
        whole = nplr(measure, N).whole()
        return DPLR(whole.eigenvalues, whole.P)
    return DPLR(-np.exp(random(N)) + 1j * random(N, seed=1), 0.3 * mixed(N, rank, seed=2), 0.3 * mixed(N, rank, seed=5))


CONTINUOUS: dict[str, Structure] = {
    "dense": Dense(random(N, N) - 4 * np.eye(N)),
    "diagonal": Diagonal(-np.exp(random(N)) + 3j * random(N, seed=1)),
    **{f"dplr of rank {rank}": dplr(rank) for rank in (0, 1, 3)},
    **{name: dplr(0, name) for name in ("legs", "legt", "lagt", "fout")},
    "oscillators": Oscillators.undamped(np.exp(random(N // 2))),
}
DISCRETE: dict[str, Structure] = {
    **{f"{name}, sampled": A.sampled(np.ones(N), 0.1)[0] for name, A in CONTINUOUS.items()},
    "a mode that is zero": Diagonal(np.array([0.0, 0.9j, -0.9j, 0.5, 0.99, -1.0, 1.0, 0.1])),
    "companion": Companion(random(N) / np.abs(random(N)).sum()),
    "complex companion": Companion(mixed(N) / np.abs(mixed(N)).sum()),
    "shift": Shift(N),
    "a double eigenvalue": Oscillators(np.array([[[0.5, 1.0], [0.0, 0.5]]] * (N // 2))),
}


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_products_and_resolvents_are_those_of_the_matrix(name: str) -> None:
    A = {**CONTINUOUS, **DISCRETE}[name]
    x, B, C = mixed(2, 3, N), random(N, seed=7), mixed(N, seed=8)
    np.testing.assert_allclose(A.apply(x), x @ A.dense().T, rtol=1e-12, atol=1e-12)
    s = np.array([0.3 + 2j, 1.5 - 1j, -3.0 + 7j, 40.0])
    wanted = [C @ np.linalg.solve(z * np.eye(N) - A.dense(), B) for z in s]
    np.testing.assert_allclose(A.transfer(B, C, s), wanted, rtol=1e-11)


@pytest.mark.parametrize("length", [1, 5, 64, 500])
@pytest.mark.parametrize("name", DISCRETE)
def test_a_kernel_by_its_own_algorithm_is_the_one_defined(name: str, length: int) -> None:
    A = DISCRETE[name]
    B, C = random(N, seed=7), random(N, seed=8)
    wanted = np.array([C @ np.linalg.matrix_power(A.dense(), tap) @ B for tap in range(length)])
    size = np.abs(wanted).max() + 1
    np.testing.assert_allclose(krylov(A, B, C, length), wanted, rtol=0, atol=1e-12 * size)
    np.testing.assert_allclose(A.kernel(B, C, length), wanted, rtol=0, atol=1e-11 * size)
    x, outputs = np.zeros((2, N)), []
    for u in (np.array([1.0, 2.0]), *np.zeros((min(length, 9) - 1, 2))):
        y, x = step(A, B, C, x, u)
        outputs.append(y)
    np.testing.assert_allclose(np.stack(outputs), wanted[: len(outputs), None] * [1, 2], rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("name", ["legs", "legt", "fout"])
def test_long_kernels_keep_their_digits(name: str) -> None:
    """LegT and FouT hardly decay: their poles lie next to the nodes of a transform on the unit circle."""
    whole = nplr(name, 32).whole()
    A, B = DPLR(whole.eigenvalues, whole.P).sampled(whole.B, 1e-2)
    C = random(32) @ whole.basis
    wanted = krylov(A, B, C, 4096)
    got = A.kernel(B, C, 4096)
    assert np.abs(wanted.imag).max() < 1e-12
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("rule", ["euler", "backward_euler", "bilinear", "zoh"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_sampled_structure_is_the_sampled_matrix(name: str, rule: str) -> None:
    A, B = CONTINUOUS[name], random(N, seed=7)
    if isinstance(A, DPLR) and rule == "zoh":
        with pytest.raises(ValueError, match="rule='zoh'"):
            A.sampled(B, 0.1, rule)
        return
    wanted = discretize(A.dense(), B, 0.1, rule)
    got = A.sampled(B, 0.1, rule)
    assert type(got[0]) is type(A)
    np.testing.assert_allclose(got[0].dense(), wanted[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-10, atol=1e-12)


def test_a_step_of_dplr_makes_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPLR, "dense", lambda self: pytest.fail("a matrix was made"))
    n = 100_000  # of which a matrix would take 160 GB
    A, B = DPLR(-np.exp(random(n)) + 1j * random(n, seed=1), random(n, 2) / n).sampled(random(n), 0.1)
    y, x = step(A, B, np.ones(n), np.zeros(n, dtype=np.complex128), np.ones(()))
    assert np.isfinite(y) and x.shape == (n,)


def test_oscillators_are_those_of_linoss() -> None:
    k, dt = np.array([0.5, 4.0]), 0.3
    B = np.array([1.0, -2.0, 0.0, 0.0])
    S = 1 / (1 + dt**2 * k)
    implicit, drive = Oscillators.undamped(k).sampled(B, dt, "implicit")
    for i in range(2):
        M = [[1 - dt**2 * k[i] * S[i], -dt * k[i] * S[i]], [dt * S[i], S[i]]]
        np.testing.assert_allclose(implicit.blocks[i], M, rtol=1e-14)
    np.testing.assert_allclose(drive, np.concatenate([dt * S * B[:2], dt**2 * S * B[:2]]), rtol=1e-14)
    explicit, drive = Oscillators.undamped(k).sampled(B, dt)
    for i in range(2):
        np.testing.assert_allclose(explicit.blocks[i], [[1, -dt * k[i]], [dt, 1 - dt**2 * k[i]]], rtol=1e-14)
        assert abs(np.linalg.det(explicit.blocks[i]) - 1) < 1e-14  # what keeps the energy
    np.testing.assert_allclose(drive, np.concatenate([dt * B[:2], dt**2 * B[:2]]), rtol=1e-14)
    # Both rules are of first order, and so come near the equation y″ = −k y + B u.
    exact = solve_ivp(lambda _, x: np.array([-4 * x[1] - 2, x[0]]), (0, 1), [0.0, 0.0], rtol=1e-10, atol=1e-12).y[1, -1]
    for rule in ("implicit", "implicit_explicit"):
        A, b = Oscillators.undamped(k).sampled(B, 1e-3, rule)
        found = A.kernel(b, np.array([0.0, 0, 0, 1]), 1000).sum()
        assert 1e-6 < abs(found - exact) < 5e-3


def test_a_companion_has_the_roots_of_its_polynomial() -> None:
    A = Companion(np.array([6.0, -11.0, 6.0]))
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(A.dense())), [1, 2, 3], rtol=1e-12)
    for seed in range(20):
        a = random(N, seed=seed)
        assert np.abs(np.linalg.eigvals(Companion(a / np.abs(a).sum()).dense())).max() <= 1


def test_the_circle_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the unit circle itself a pole of a system that does not decay can be a node."""
    A = DPLR(np.array([1.0, -1.0]), np.zeros((2, 1)))
    B = C = np.ones(2)
    np.testing.assert_allclose(A.kernel(B, C, 8), krylov(A, B, C, 8), atol=1e-12)
    with np.errstate(all="ignore"):
        on_the_circle = A.transfer(B, C, structured._roots_of_unity(8))
    assert not np.isfinite(on_the_circle).all()
