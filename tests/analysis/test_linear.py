"""Systems read off a step of a layer, against the layer run on impulses, closed forms, and Hankel matrices."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from contract import ROWS, Row, build
from longstate import (
    DSS,
    FFM,
    H3,
    LRU,
    LSSL,
    LTC,
    RGLRU,
    S4,
    S4D,
    S5,
    STU,
    Attention,
    Hyena,
    LinOSS,
    LiquidS4,
    LongConv,
    Mamba,
    Mamba2,
    Mega,
    Megalodon,
    Mixer,
    SGConv,
    ShortConv,
    SpaceTime,
    Timeline,
    systems,
)
from longstate.analysis import linear
from longstate.routes import Bidirectional

LINEAR = (S4, S4D, S5, LRU, LSSL, DSS, LinOSS, SpaceTime, STU, LongConv, SGConv, Mega, Megalodon, H3)
OTHERS = (Mamba, Mamba2, RGLRU, ShortConv, Attention, Hyena, LTC, FFM, LiquidS4, Bidirectional)
STEPS = 70  # enough for layers to convolve


def measured(mixer: Mixer) -> np.ndarray:
    """Return ``[l outputs inputs]``: what the linear part of a layer does after an impulse into each input."""
    mixer = copy.deepcopy(mixer).eval()
    width, plain = mixer.d_model, Timeline()
    x = torch.zeros(width, STEPS, width, dtype=torch.float64)
    x[:, 0] = torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        if isinstance(mixer, H3):
            log_decay, B, C = mixer.system()
            age = torch.arange(STEPS)[:, None, None]
            taps = 2 * (C * B * torch.exp(log_decay * age)).sum(-1).real
            taps[0] += mixer.D
            return torch.diag_embed(taps).numpy()
        if isinstance(mixer, Mega | Megalodon):
            average = mixer.ema if isinstance(mixer, Mega) else mixer.cema
            return average(x, None, plain)[0].permute(1, 2, 0).numpy()
        if hasattr(mixer, "output"):
            mixer.output = nn.Identity()
        return mixer(x)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_system_does_what_the_layer_does(row: Row) -> None:
    mixer = build(row.make)
    if isinstance(mixer, OTHERS):
        with pytest.raises(ValueError, match=r"is not a linear time-invariant system|is no system with a state"):
            linear.linear_systems(mixer)
        return
    try:
        found = linear.linear_systems(mixer)
    except ValueError:
        assert not isinstance(mixer, LINEAR)
        return
    taps = [systems.impulse_response(system, STEPS) for system in found]
    wanted = measured(mixer)
    kernel = taps[0] if len(taps) == 1 else np.stack([np.diag(x) for x in np.concatenate(taps, 1)[..., 0]])
    assert kernel.shape == wanted.shape
    assert np.abs(kernel - wanted).max() <= 1e-10 * np.abs(wanted).max()
    if len(found) > 1:
        (last,) = linear.linear_systems(mixer, channels=[len(found) - 1])
        assert all(np.array_equal(getattr(last, name), getattr(found[-1], name)) for name in "ABCD")


def test_channels_that_mix_are_one_system_though_sizes_agree() -> None:
    """A state as wide as the layer looks like one state a channel."""
    (found,) = linear.linear_systems(build(lambda: S5(4, 8)))
    assert found.B.shape == (8, 4)
    assert len(linear.linear_systems(build(lambda: S4D(3, 6, "lin")))) == 3


def test_another_time_between_steps() -> None:
    layer = S4D(2, 4, "lin").double()
    A, B, C, dt = (x.detach().numpy() for x in layer.system())
    for system, a, b, c, step in zip(linear.linear_systems(layer, 0.3), A, B, C, dt, strict=True):
        z = np.exp(0.3 * step * a)
        taps = 2 * (c * b * (z - 1) / a * z ** np.arange(1, 9)[:, None]).sum(-1).real
        assert system.dt == 0.3
        np.testing.assert_allclose(systems.impulse_response(system, 9)[1:, 0, 0], taps, rtol=1e-10)
    with pytest.raises(ValueError, match="counts steps and knows no time"):
        linear.linear_systems(LRU(2, 3), 0.5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: S4D(3, 16, "inv"),
        lambda: S4D(3, 16, "quad", "bilinear"),
        lambda: S4D(3, 7, "real"),
        lambda: S5(4, 12, discretization="bilinear"),
        lambda: DSS(3, 8),
    ],
)
def test_continuous_poles(layer: object) -> None:
    mixer = build(layer)
    if isinstance(mixer, S4D):
        A, dt = mixer.system()[::3]
        A = A * dt[:, None]
    elif isinstance(mixer, S5):
        A = torch.complex(-mixer.A_real.exp(), mixer.A_imag) * mixer.log_dt.exp()
    else:
        A = mixer.modes()[1]
    wanted = A.detach().numpy().reshape(-1)
    wanted = np.concatenate([wanted, wanted.conj()]) if A.is_complex() else wanted
    found = np.concatenate(linear.continuous_poles(mixer))
    assert len(found) == len(wanted)
    for some, others in ((found, wanted), (wanted, found)):
        nearest = np.abs(some[:, None] - others).min(1)
        assert (nearest <= 1e-6 * np.abs(some) + 1e-9).all()


@pytest.mark.parametrize("layer", [lambda: S4D(3, 6, "lin", dt_min=0.1, dt_max=0.5), lambda: LRU(3, 4, 0.1, 0.8)])
def test_hankel_singular_values(layer: object) -> None:
    mixer = build(layer)
    found = linear.hankel_singular_values(mixer)
    for values, system in zip(found, linear.linear_systems(mixer), strict=True):
        np.testing.assert_allclose(values, systems.hankel_singular_values(system), atol=1e-10 * values[0])
        taps = systems.impulse_response(system, 600)
        assert np.abs(taps[-1]).max() < 1e-12
        blocks = [[taps[1 + i + j] for j in range(299)] for i in range(299)]
        hankel = scipy.linalg.svdvals(np.block(blocks))
        np.testing.assert_allclose(values, hankel[: len(values)], atol=1e-10 * values[0])


def test_oscillators_turn_without_decay() -> None:
    """LinOSS by its rule that keeps volume: s = ± i √A Δ of each, twice, as states have two parts."""
    layer = build(lambda: LinOSS(2, 3, "imex"))
    (found,) = linear.continuous_poles(layer)
    turning = layer.A.clamp(min=0).sqrt().mul(layer.log_dt.exp()).detach().numpy()
    assert len(found) == 12
    assert np.abs(np.sort(found.imag) - np.sort(np.concatenate([turning, turning, -turning, -turning]))).max() < 1e-4
    assert np.abs(found.real).max() < 1e-4
    with pytest.raises(ValueError, match="on the unit circle or outside"):
        linear.hankel_singular_values(layer)


def test_an_unstable_layer_has_no_hankel_values() -> None:
    layer = S4D(2, 4, parameterization="direct")
    layer.A_real.data[1] = 0.1
    with pytest.raises(ValueError, match="on the unit circle or outside"):
        linear.hankel_singular_values(layer)


def test_memory_is_the_norm_of_the_kernel_read_or_measured() -> None:
    layer = build(lambda: S4D(4, 6, output="identity"))
    wanted = np.sqrt((measured(layer) ** 2).sum((1, 2)))
    read = linear.memory(layer, STEPS)
    np.testing.assert_allclose(read, wanted, rtol=1e-10)
    moved = linear.memory(layer, STEPS, torch.randn(STEPS + 5, 4))
    np.testing.assert_allclose(moved, wanted, rtol=1e-6, atol=1e-8)


def test_memory_of_a_window_ends_with_it() -> None:
    left = linear.memory(Attention(4, 2, window=5), 12)
    assert (left[:5] > 1e-3).all() and (left[5:] == 0).all()
    gated = build(lambda: Mamba(3, 2))
    x = torch.randn(9, 3, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda u: gated(u[None])[0][0], x)[3:, :, 3]
    signs = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    wanted = (J @ signs.T).square().sum(1).mean(-1).sqrt()
    np.testing.assert_allclose(linear.memory(gated, 6, x), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear.linear_systems(Mamba(4)), "Mamba is not a linear time-invariant system"),
        (lambda: linear.linear_systems(LongConv(2, 9000, output="identity")), "8999 states a channel, too many"),
        (lambda: linear.linear_systems(S4D(2, 4), channels=[2]), "S4D has channels 0 to 1"),
        (lambda: linear.memory(Bidirectional(S4D(2, 4)), 5), "wanted a causal layer"),
        (lambda: linear.memory(Mamba(4), 9, torch.zeros(8, 4)), "no fewer inputs than steps, not 8"),
    ],
)
def test_what_cannot_be_read(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
