"""Synthetic tasks: inputs, and what is to be said of them at each step.

All draw from a generator that is given, so that the same seed gives the same numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from .._shapes import Float, Shaped, Tensor

IGNORED = -100  # a target that is not asked for: the default of torch's cross_entropy
_BLANK = 0


class Task(NamedTuple):
    """Inputs and targets.

    Attributes:
        x: What is read.
        y: What is wanted after each step.
    """

    x: Shaped[Tensor, "b t *d"]
    y: Shaped[Tensor, "b t *d"]


def delay(random: np.random.Generator, batch: int, length: int, lag: int, band: float) -> Task:
    """Return band-limited noise of variance 1, and what it was ``lag`` steps ago (0 before the first step).

        y_t = x_{t − lag}

    Args:
        random: Where the numbers come from.
        batch: Sequences.
        length: Steps.
        lag: Steps to remember for.
        band: Highest frequency, in cycles a step; at most ½.

    Raises:
        ValueError: If the noise has no band, or there is nothing to remember.

    Source:
        Gu et al., arXiv:2206.12037.
    """
    frequencies = np.fft.rfftfreq(length)
    inside = (frequencies > 0) & (frequencies <= band)
    if not inside.any() or not 0 < lag < length:
        raise ValueError(
            f"delay(length={length}, lag={lag}, band={band}): wanted 0 < lag < length and a band of at least "
            f"{1 / length:.3g} cycles a step"
        )
    spectrum = random.standard_normal((2, batch, len(frequencies))) * inside
    x = np.fft.irfft(spectrum[0] + 1j * spectrum[1], length)
    x = x / np.sqrt((x**2).mean(1, keepdims=True))
    y = np.concatenate([np.zeros((batch, lag)), x[:, :-lag]], 1)
    return Task(*(torch.from_numpy(z[..., None]).float() for z in (x, y)))


def copying(random: np.random.Generator, batch: int, symbols: int, vocabulary: int, gap: int) -> Task:
    """Return some symbols, a gap of blanks and a mark, after which the symbols are wanted again.

    Symbols are 1 to ``vocabulary``, the blank is 0, the mark ``vocabulary`` + 1. A sequence has 2·symbols + gap steps;
    the mark stands where the first symbol is wanted, with blanks behind it. Chance is 1/vocabulary.

    Args:
        random: Where the numbers come from.
        batch: Sequences.
        symbols: Symbols to be remembered.
        vocabulary: How many different ones there are.
        gap: Blanks between the last symbol and the mark.

    Raises:
        ValueError: If there is nothing to copy.

    Source:
        Arjovsky et al., 2016 (unitary recurrent networks), after Hochreiter and Schmidhuber, 1997.
    """
    if min(symbols, vocabulary) < 1 or gap < 0:
        raise ValueError(f"copying({symbols=}, {vocabulary=}, {gap=}): wanted symbols, and a gap of at least 0")
    said = torch.from_numpy(random.integers(1, vocabulary + 1, (batch, symbols)))
    x = torch.full((batch, 2 * symbols + gap), _BLANK)
    x[:, :symbols], x[:, symbols + gap] = said, vocabulary + 1
    y = torch.full_like(x, IGNORED)
    y[:, symbols + gap :] = said
    return Task(x, y)


def lorenz(random: np.random.Generator, batch: int, length: int, dt: float = 0.01) -> Float[Tensor, "b t 3"]:
    """Return runs of Lorenz' system on its attractor, in its own units.

        x′ = σ(y − x),    y′ = x(ρ − z) − y,    z′ = xy − βz,    σ = 10, ρ = 28, β = 8/3

    by the classical Runge-Kutta method in float64. Errors grow by e in 1/0.906 units of time.

    Args:
        random: Where the initial points come from.
        batch: Runs.
        length: Steps of each.
        dt: Time between them.

    Source:
        Lorenz, 1963.
    """
    point = random.standard_normal((batch, 3)) * 5 + np.array([0, 0, 25.0])
    settled, path = math.ceil(20 / dt), np.empty((batch, length, 3))
    for step in range(-settled, length):
        if step >= 0:
            path[:, step] = point
        point = _runge_kutta(point, dt)
    return torch.from_numpy(path).float()


def _runge_kutta(point: np.ndarray, dt: float) -> np.ndarray:
    def slope(p: np.ndarray) -> np.ndarray:
        x, y, z = p.T
        return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], -1)

    a = slope(point)
    b = slope(point + dt / 2 * a)
    c = slope(point + dt / 2 * b)
    d = slope(point + dt * c)
    return np.asarray(point + dt / 6 * (a + 2 * b + 2 * c + d))


def stable_coefficients(random: np.random.Generator, order: int, low: float = 0.7, high: float = 0.95) -> np.ndarray:
    """Return coefficients of an AR process whose poles lie on a ring, most of them in conjugate pairs.

    Args:
        random: Where the poles come from.
        order: p, the number of coefficients.
        low: Least modulus of a pole.
        high: Greatest modulus, below 1.

    Raises:
        ValueError: If the ring is not inside the unit circle.
    """
    if order < 1 or not 0 < low <= high < 1:
        raise ValueError(f"stable_coefficients({order=}, {low=}, {high=}): wanted an order, and 0 < low ≤ high < 1")
    pairs = random.uniform(low, high, order // 2) * np.exp(1j * random.uniform(0, np.pi, order // 2))
    poles = np.concatenate([pairs, pairs.conj(), random.uniform(low, high, order % 2)])
    return -np.poly(poles).real[1:]


def autoregressive(random: np.random.Generator, batch: int, length: int, coefficients: np.ndarray) -> Task:
    """Return an AR(p) series in its stationary state, and at each step the next value.

        x_t = Σ_i a_i x_{t−i} + e_t,    e_t ~ N(0, 1),    y_t = x_{t+1}

    No prediction has a mean squared error below 1, and Σ_i a_i x_{t+1−i} has just that.

    Args:
        random: Where the numbers come from.
        batch: Series.
        length: Steps.
        coefficients: a_1 … a_p.

    Raises:
        ValueError: If the process is not stable.
    """
    order = len(coefficients)
    radius = max(abs(np.roots(np.concatenate([[1.0], -np.asarray(coefficients)]))), default=0.0)
    if radius >= 1:
        raise ValueError(f"autoregressive: a pole of modulus {radius:.3f}, and the series would grow for ever")
    # What is left of the zeros that it begins with has died away to 1e-6.
    settled = 10 if radius == 0 else 10 + order + math.ceil(math.log(1e-6) / math.log(radius))
    x = np.zeros((batch, order + settled + length + 1))
    noise = random.standard_normal(x.shape)
    for t in range(order, x.shape[1]):
        x[:, t] = x[:, t - order : t][:, ::-1] @ coefficients + noise[:, t]
    x = x[:, -length - 1 :, None]
    return Task(torch.from_numpy(x[:, :-1].copy()).float(), torch.from_numpy(x[:, 1:].copy()).float())
