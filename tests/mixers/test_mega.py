"""Mega and Megalodon against kernels, statistics and attention written out; what is drawn; sizes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longstate import Mega, Megalodon, Mixer
from longstate.mixers.megalodon import CEMA, TimestepNorm
from longstate.timeline import Timeline

LENGTH = 70


def build(make: type[Mixer], *arguments: int, **options: int | None) -> Mixer:
    mixer = make(*arguments, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    y = x @ array(layer.weight).T
    return y if layer.bias is None else y + array(layer.bias)


def convolved(kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.stack([np.convolve(kernel[i], x[:, i])[: len(x)] for i in range(x.shape[1])], 1)


def attended(score: np.ndarray, v: np.ndarray, chunk: int | None) -> np.ndarray:
    t, s = np.indices(score.shape)
    visible = (s <= t) if chunk is None else (s <= t) & (s // chunk == t // chunk)
    weights = np.where(visible, np.exp(score), 0)
    return weights / weights.sum(1, keepdims=True) @ v


@pytest.mark.parametrize("chunk", [None, 9])
def test_mega_written_out(chunk: int | None) -> None:
    mixer = build(Mega, 3, 4, d_key=6, d_value=5, chunk=chunk)
    x = torch.randn(1, LENGTH, 3, dtype=torch.float64)
    got = array(mixer(x)[0])[0]
    u, ema = array(x)[0], mixer.ema
    p = sigmoid(array(ema.alpha))
    q = 1 - p * sigmoid(array(ema.delta))
    powers = q[..., None] ** np.arange(LENGTH)
    kernel = ((p * array(ema.beta) * array(ema.eta))[..., None] * powers).sum(1) / 2  # √4
    averaged = silu(convolved(kernel, u) + array(ema.omega) * u)
    z, gate, update, candidate = np.split(linear(mixer.mx_proj, averaged), [6, 11, 14], 1)
    scale, shift = array(mixer.scale), array(mixer.shift)
    score = (silu(z) * scale[0] + shift[0]) @ (silu(z) * scale[1] + shift[1]).T / np.sqrt(6)
    a, b = (x[:3] + 1j * x[3:] for x in array(mixer.bias))
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    frequency = 10000.0 ** -(np.arange(3) / 3)
    score += (a.conj() * b * np.exp(-1j * frequency * distance[..., None])).sum(-1).real
    o = attended(score, silu(linear(mixer.v_proj, u)), chunk)
    candidate = silu(candidate + linear(mixer.h_proj, silu(gate) * o))
    wanted = sigmoid(update) * candidate + (1 - sigmoid(update)) * u
    assert np.abs(got - wanted).max() < 1e-12
    assert np.abs(wanted - u).max() > 0.1


@pytest.mark.parametrize("chunk", [None, 16])
def test_megalodon_written_out(chunk: int | None) -> None:
    mixer = build(Megalodon, 4, 3, d_key=8, d_value=6, n_heads=2, chunk=chunk, norm_groups=2)
    x = torch.randn(1, LENGTH, 4, dtype=torch.float64)
    got = array(mixer(x)[0])[0]
    u = np.zeros((LENGTH, 4))
    for t in range(LENGTH):
        for g in (slice(0, 2), slice(2, 4)):
            seen = array(x)[0, : t + 1, g]
            u[t, g] = (seen[-1] - seen.mean()) / np.sqrt(seen.var() + 1e-5)
    u = u * array(mixer.norm.weight) + array(mixer.norm.bias)
    cema = mixer.cema
    p = sigmoid(array(cema.alpha))
    phase = 2 * np.pi * np.arange(1, 4) * sigmoid(array(cema.theta))[:, None] / 3
    q = (1 - p * sigmoid(array(cema.delta))) * np.exp(1j * phase)
    eta = array(cema.eta) @ [1, 1j]
    kernel = ((p * eta)[..., None] * q[..., None] ** np.arange(LENGTH)).sum(1).real / np.sqrt(3)
    averaged = convolved(kernel, u) + array(cema.omega) * u
    z, gate, candidate = np.split(linear(mixer.mx_proj, averaged), [8, 14], 1)
    v = silu(linear(mixer.v_proj, u))
    scale, shift = array(mixer.scale), array(mixer.shift)
    turn = np.exp(1j * np.arange(LENGTH)[:, None] * 10000.0 ** -(np.arange(2) / 2))
    o = []
    for head in range(2):
        at = slice(4 * head, 4 * head + 4)
        direction = z[:, at] / np.linalg.norm(z[:, at], axis=1, keepdims=True)
        query, key = (direction * scale[i, at] + shift[i, at] for i in (0, 1))
        query, key = ((y[:, :2] + 1j * y[:, 2:]) * turn for y in (query, key))
        o.append(attended((query @ key.conj().T).real, v[:, 3 * head : 3 * head + 3], chunk))
    wanted = candidate + linear(mixer.h_proj, silu(gate) * np.concatenate(o, 1))
    assert np.abs(got - wanted).max() < 1e-9  # ε below the root of z² is 1e-12


def test_statistics_keep_their_digits_far_from_zero() -> None:
    """In float32, a mean a thousand times the deviation: E[x²] − E[x]² would have lost all digits of the variance."""
    norm = TimestepNorm(4, 1)
    x = 1000 + torch.randn(1, 400, 4)
    y, state = norm(x, None, Timeline())
    seen = x.double()
    assert abs(state.variance.item() / seen.var(correction=0).item() - 1) < 1e-3
    assert (y[0, -1] - (seen[0, -1] - seen.mean()) / seen.std(correction=0)).abs().max() < 1e-3


def test_a_constant_input_has_no_spread() -> None:
    norm = TimestepNorm(4, 2).double()
    y, state = norm(torch.full((2, 6, 4), 3.0, dtype=torch.float64), None, Timeline())
    assert y.abs().max() == 0 and state.variance.abs().max() == 0 and (state.mean == 3).all()
    assert state.steps.tolist() == [6, 6]


def test_averages_are_stable_whatever_their_parameters() -> None:
    cema = CEMA(3, 4).double()
    with torch.no_grad():
        for parameter in cema.parameters():
            parameter.mul_(20)
    y, h = cema(torch.randn(1, 3000, 3, dtype=torch.float64), None, Timeline())
    assert y.isfinite().all() and h.abs().max() < 1e4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mega(4, d_key=5), "d_key=6"),
        (lambda: Mega(4, d_state=0), "d_state"),
        (lambda: Mega(4, chunk=0), "chunk"),
        (lambda: Megalodon(4, d_key=6, n_heads=2), "d_key"),
        (lambda: Megalodon(4, d_value=5, n_heads=2), "d_value"),
        (lambda: Megalodon(4, norm_groups=3), "groups"),
        (lambda: Megalodon(4, norm_eps=0.0), "eps"),
        (lambda: Megalodon(4, chunk=-1), "chunk"),
        (lambda: Megalodon(4, d_state=0), "d_state"),
    ],
)
def test_sizes_that_do_not_go_together(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
