"""HiPPO's measures: how they are normal plus low rank, and that their states are the coefficients they should be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.polynomial import laguerre, legendre
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from scipy.special import eval_genlaguerre, gammaln

from longstate.systems import hippo
from longstate.systems.hippo import MEASURES, diagonal_modes, normal_plus_low_rank, nplr

RANKS = {"legt": 2, "lmu": 2, "foud": 0, "legsd": 0}
ROOTS = np.sqrt(2 * np.arange(8) + 1)


@pytest.mark.parametrize("n", [2, 8, 64, 256])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_normal_plus_low_rank(name: str, n: int) -> None:
    measure = MEASURES[name]
    A, B = measure.system(n)
    P, d = measure.low_rank(n), measure.scale(n)
    assert (A.shape, B.shape, d.shape) == ((n, n), (n,), (n,)) and (P.shape[1] == RANKS.get(name, 1))
    N = A * d / d[:, None] + P @ P.T
    size = max(1, np.abs(N).max())
    np.testing.assert_allclose(N + N.T, 2 * N[0, 0] * np.eye(n), atol=1e-14 * size * n)  # skew plus a multiple of I
    np.testing.assert_allclose(N @ N.T, N.T @ N, atol=1e-14 * n * size**2)
    if P.shape[1] and n > 2:
        A = A * d / d[:, None]
        assert np.linalg.matrix_rank(P) == P.shape[1]
        assert not np.allclose(A @ A.T, A.T @ A)


@pytest.mark.parametrize("n", [2, 8, 64, 256])
@pytest.mark.parametrize("name", MEASURES)
def test_modes_and_low_rank_rebuild_the_system(name: str, n: int) -> None:
    A, B = MEASURES[name].system(n)
    half = nplr(name, n)
    V, W = half.basis, half.inverse
    assert V.shape == W.T.shape == (n, n // 2) and (half.eigenvalues.imag >= 0).all()
    atol = 1e-13 * n * np.abs(A).max()
    normal = 2 * (V * half.eigenvalues @ W).real
    rank = 2 * (V @ half.P).real @ (2 * (half.P.conj().T @ W).real)
    np.testing.assert_allclose(normal - rank, A, atol=atol)
    np.testing.assert_allclose(2 * (V @ half.B).real, B, atol=atol)
    whole = half.whole()
    middle = np.diag(whole.eigenvalues) - whole.P @ whole.P.conj().T
    np.testing.assert_allclose(whole.basis @ middle @ whole.inverse, A, atol=atol)
    np.testing.assert_allclose(whole.inverse @ whole.basis, np.eye(n), atol=1e-10)
    np.testing.assert_allclose(whole.basis @ whole.B, B, atol=atol)


def test_a_still_mode_is_found_with_its_conjugate() -> None:
    """FouT's constant: eigenvalue 0 twice, for which eigh returns any basis."""
    modes = nplr("fout", 6)
    np.testing.assert_allclose(modes.eigenvalues, [0, 1j * math.pi, 2j * math.pi], atol=1e-14)
    A = np.zeros((4, 4))
    A[2, 3], A[3, 2] = -2.0, 2.0
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    found = diagonal_modes(turn @ A @ turn.T, turn[:, 0])
    V = found.basis
    np.testing.assert_allclose(2 * (V * found.eigenvalues @ V.conj().T).real, turn @ A @ turn.T, atol=1e-14)
    np.testing.assert_allclose(2 * (V @ found.B).real, turn[:, 0], atol=1e-14)
    np.testing.assert_allclose(V.T @ V, 0, atol=1e-14)  # no mode leans on another's conjugate


def test_a_measure_with_other_options() -> None:
    A, B = hippo.lmu(8, window=3.0)
    plain = MEASURES["lmu"]
    got = normal_plus_low_rank(A, B, plain.low_rank(8) / math.sqrt(3), plain.scale(8))
    np.testing.assert_allclose(got.eigenvalues, nplr("lmu", 8).eigenvalues / 3, rtol=1e-12)
    with pytest.raises(ValueError, match="skew"):
        normal_plus_low_rank(A, B, plain.low_rank(8), plain.scale(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nplr("leg", 4), "legs|legt"),
        (lambda: nplr("legs", 5), "even size"),
        (lambda: nplr("fout", 5), "n=6"),
        (lambda: hippo.lmu(4, 0.0), "positive"),
        (lambda: hippo.generalised_lagt(4, 1.0), "alpha=1"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def u(t: float) -> float:
    return math.sin(2 * t) + 0.5 * math.cos(5 * t) + 0.2 * t


def integral(f: Callable[[float], float], low: float, high: float) -> float:
    return quad(f, low, high, epsabs=1e-12, epsrel=1e-12, limit=400)[0]


def integrated(
    slope: Callable[[float, np.ndarray], np.ndarray], times: tuple[float, float], x: np.ndarray
) -> np.ndarray:
    return solve_ivp(slope, times, x, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]


def legs_coefficients(t: float) -> np.ndarray:
    """Return (1/t) ∫₀ᵗ u(s) √(2n+1) P_n(2s/t − 1) ds."""
    return np.array([R * integral(lambda s, n=n: u(s) * legendre.Legendre.basis(n)(2 * s / t - 1), 0, t) / t
                     for n, R in enumerate(ROOTS)])  # fmt: skip


def test_legs_holds_the_projection_of_all_of_the_past() -> None:
    A, B = hippo.legs(8)
    got = integrated(lambda t, x: (A @ x + B * u(t)) / t, (0.5, 4.0), legs_coefficients(0.5))
    np.testing.assert_allclose(got, legs_coefficients(4.0), atol=1e-9)


def test_lagt_holds_the_projection_under_a_decaying_weight() -> None:
    A, B = hippo.lagt(8)
    got = integrated(lambda t, x: A @ x + B * u(t), (0.0, 4.0), np.zeros(8))
    wanted = [integral(lambda s, n=n: u(s) * math.exp((s - 4) / 2) * laguerre.Laguerre.basis(n)(4 - s), 0, 4)
              for n in range(8)]  # fmt: skip
    np.testing.assert_allclose(got, wanted, atol=1e-9)


def legt_coefficients(f: Callable[[float], float], t: float) -> np.ndarray:
    """Return ½ ∫ f(s) √(2n+1) P_n(s − t + 1) ds over the window [t − 2, t]."""
    return np.array([R / 2 * integral(lambda s, n=n: f(s) * legendre.Legendre.basis(n)(s - t + 1), t - 2, t)
                     for n, R in enumerate(ROOTS)])  # fmt: skip


def test_legt_holds_the_projection_of_a_window() -> None:
    """Exactly so for polynomials of degrees below n: of another input it forgets what it never held."""
    A, B = hippo.legt(8)
    p = legendre.Legendre([0.3, -1, 0.5, 0.7, 0, -0.4, 0.2, 0.1], domain=[-2, 3])
    got = integrated(lambda t, x: A @ x + B * p(t), (0.0, 3.0), legt_coefficients(p, 0.0))
    np.testing.assert_allclose(got, legt_coefficients(p, 3.0), atol=1e-9)
    got = integrated(lambda t, x: A @ x + B * u(t), (0.0, 3.0), legt_coefficients(u, 0.0))
    assert 1e-6 < np.abs(got - legt_coefficients(u, 3.0))[:4].max() < 0.1
    D = ROOTS * (-1.0) ** np.arange(8)
    np.testing.assert_allclose(hippo.lmu(8)[0], 2 * A * D[:, None] / D, atol=1e-12)
    np.testing.assert_allclose(hippo.lmu(8)[1], 2 * B * D, atol=1e-12)


def test_fout_holds_the_fourier_coefficients_of_a_window() -> None:
    """Exactly so for sums of its own waves."""

    def waves(t: float) -> float:
        return 0.4 + math.cos(math.pi * t) - 0.3 * math.sin(2 * math.pi * t) + 0.2 * math.cos(3 * math.pi * t + 1)

    def coefficients(t: float) -> np.ndarray:
        found = []
        for f in range(4):
            weight = 1 if f == 0 else math.sqrt(2)
            found += [weight / 2 * integral(lambda s, f=f, g=g: waves(s) * g(math.pi * f * (t - s)), t - 2, t)
                      for g in (math.cos, math.sin)]  # fmt: skip
        return np.array(found)

    A, B = hippo.fout(8)
    got = integrated(lambda t, x: A @ x + B * waves(t), (0.0, 2.7), coefficients(0.0))
    np.testing.assert_allclose(got, coefficients(2.7), atol=1e-9)


@pytest.mark.parametrize("age", [0.0, 0.3, 2.0, 5.0])
def test_what_an_impulse_leaves_behind(age: float) -> None:
    """e^{At}B is the weight of the input t ago: the measure's functions themselves, where nothing is approximated."""
    n = np.arange(6)

    def left(system: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return expm(system[0] * age) @ system[1]

    shifted = np.array([legendre.Legendre.basis(k)(2 * math.exp(-age) - 1) for k in n])
    np.testing.assert_allclose(left(hippo.legs(6)), ROOTS[:6] * shifted * math.exp(-age), atol=1e-12)
    for beta in (0.5, 1.0, 2.0):
        plain = np.array([laguerre.Laguerre.basis(k)(age) for k in n]) * math.exp(-(1 + beta) / 2 * age)
        np.testing.assert_allclose(left(hippo.tilted_lagt(6, beta)), beta * plain, atol=1e-12)
        for alpha in (0.0, 0.4, -0.6):
            functions = eval_genlaguerre(n, alpha, age) * math.exp(-(1 + beta) / 2 * age)
            size = np.exp((gammaln(n + alpha + 1) - gammaln(n + 1)) / 2)
            wanted = functions / size * math.gamma(1 - alpha) ** -0.5 * beta ** ((1 - alpha) / 2)
            np.testing.assert_allclose(left(hippo.generalised_lagt(6, alpha, beta)), wanted, atol=1e-12)
    angle = 2 * math.pi * np.repeat(np.arange(3), 2) * age
    waves = np.where(n % 2, np.sin(angle), np.cos(angle)) * math.exp(-age / 2) * np.sqrt([1, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(left(hippo.foud(6)), waves, atol=1e-12)
