"""Synthetic tasks are what they say, by spectra, lags, the best predictor, and another integrator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from longstate.bench import autoregressive, copying, delay, lorenz, stable_coefficients


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_delayed_noise(random: np.random.Generator) -> None:
    x, y = delay(random, 3, 400, 70, 0.1)
    assert torch.equal(y[:, 70:], x[:, :-70]) and not y[:, :70].any()
    power = torch.fft.rfft(x[..., 0].double()).abs() ** 2
    inside = torch.fft.rfftfreq(400) <= 0.1
    assert power[:, ~inside].sum() < 1e-9 * power.sum() and (power[:, inside][:, 1:] > 0).all()
    torch.testing.assert_close(x.square().mean(1), torch.ones(3, 1))


def test_copying(random: np.random.Generator) -> None:
    x, y = copying(random, 5, 4, 6, 3)
    assert x.shape == y.shape == (5, 11)
    assert torch.equal(y[:, 7:], x[:, :4]) and (y[:, :7] == -100).all() and (x[:, 7] == 7).all()
    assert not x[:, 4:7].any() and not x[:, 8:].any() and set(x[:, :4].unique().tolist()) <= set(range(1, 7))


def test_lorenz_as_another_integrator_has_it(random: np.random.Generator) -> None:
    def slope(_: float, p: np.ndarray) -> list[float]:
        return [10 * (p[1] - p[0]), p[0] * (28 - p[2]) - p[1], p[0] * p[1] - 8 / 3 * p[2]]

    path = lorenz(random, 4, 300).double()
    for run in path.numpy():
        found = solve_ivp(slope, (0, 0.5), run[0], t_eval=[0.5], method="DOP853", rtol=1e-9, atol=1e-9).y[:, 0]
        np.testing.assert_allclose(run[50], found, atol=2e-3)
    assert 20 < path[..., 2].mean() < 27 and path.abs().max() < 50, "on the attractor"


def test_no_prediction_of_an_autoregressive_series_beats_its_coefficients(random: np.random.Generator) -> None:
    coefficients = stable_coefficients(random, 5)
    x, y = (z[..., 0].double() for z in autoregressive(random, 8, 4000, coefficients))
    lags = torch.stack([x[:, 7 - i : len(x[0]) - i] for i in range(8)], -1)
    wanted = y[:, 7:]
    exact = lags[..., :5] @ torch.from_numpy(coefficients.copy())
    assert (wanted - exact).square().mean() == pytest.approx(1, abs=0.03)
    fitted = torch.linalg.lstsq(lags.flatten(0, 1), wanted.flatten()).solution
    np.testing.assert_allclose(fitted[:5], coefficients, atol=0.05, rtol=0.02)
    assert wanted.square().mean() > 3, "a series that is worth predicting"


def test_the_variance_of_a_first_order_series(random: np.random.Generator) -> None:
    x, _ = autoregressive(random, 200, 300, np.array([0.9]))
    assert float(x.var()) == pytest.approx(1 / (1 - 0.81), rel=0.1)


def test_what_makes_no_task_is_named(random: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"a pole of modulus 1\.100"):
        autoregressive(random, 1, 5, np.array([1.1]))
    with pytest.raises(ValueError, match="wanted 0 < lag < length"):
        delay(random, 1, 10, 10, 0.2)
    with pytest.raises(ValueError, match=r"delay\(length=10, lag=3, band=0\.05\)"):
        delay(random, 1, 10, 3, 0.05)
    with pytest.raises(ValueError, match="wanted symbols"):
        copying(random, 1, 0, 3, 3)
    with pytest.raises(ValueError, match="0 < low ≤ high < 1"):
        stable_coefficients(random, 3, 0.9, 1.0)
