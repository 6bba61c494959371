"""Plots hold the numbers that they should, against closed forms, and are pictures."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from matplotlib.figure import Figure
from torch import nn

from longstate import H3, LRU, S4D, S5, Mamba, Megalodon
from longstate.analysis import linear, plots


def layer() -> S4D:
    return S4D(3, 8, "lin", output="identity").double()


def response(mixer: S4D, channel: int, cycles: np.ndarray) -> np.ndarray:
    """Return Σ C B̄ / (1 − Ā e^{−iω}), its conjugate at −ω, and D: written out from the parameters."""
    A, B, C, dt = (x.detach().numpy()[channel] for x in mixer.system())
    turn = np.exp(-2j * np.pi * cycles)[:, None]
    decay = np.exp(dt * A)
    weight = C * B * (decay - 1) / A
    both = weight / (1 - decay * turn) + weight.conj() / (1 - decay.conj() * turn)
    return both.sum(-1) + mixer.D[channel].item()


def test_bode_is_the_frequency_response() -> None:
    mixer = layer()
    gain, phase = plots.plot_bode(mixer, channels=[0, 2], sample_rate=100.0).axes
    assert (gain.get_ylabel(), phase.get_ylabel()) == ("gain (dB)", "phase (degrees)")
    assert phase.get_xlabel() == "frequency (Hz)"
    for channel, decibels, degrees in zip((0, 2), gain.lines, phase.lines, strict=True):
        cycles = decibels.get_xdata() / 100.0
        assert cycles[-1] == pytest.approx(0.5)
        wanted = response(mixer, channel, cycles)
        np.testing.assert_allclose(decibels.get_ydata(), 20 * np.log10(np.abs(wanted)), atol=1e-8)
        turned = np.exp(1j * np.radians(degrees.get_ydata()))
        np.testing.assert_allclose(turned, wanted / np.abs(wanted), atol=1e-8)


def test_bode_of_channels_that_mix_is_that_of_scipy() -> None:
    mixer = LRU(4, 5, 0.5, 0.9)
    (system,) = linear.linear_systems(mixer)
    gain, _ = plots.plot_bode(mixer, channels=[3]).axes
    b, a = scipy.signal.ss2tf(system.A, system.B, system.C, system.feedthrough, input=3)
    _, wanted = scipy.signal.freqz(b[3], a, worN=2 * np.pi * gain.lines[0].get_xdata())
    np.testing.assert_allclose(gain.lines[0].get_ydata(), 20 * np.log10(np.abs(wanted)), atol=1e-5)
    assert gain.get_legend().get_texts()[0].get_text() == "input 3 to output 3"


def test_kernel_is_what_an_impulse_does() -> None:
    mixer = layer()
    x = torch.zeros(1, 90, 3, dtype=torch.float64)
    x[:, 0] = 1
    with torch.no_grad():
        wanted = mixer(x)[0][0].numpy()
    figure = plots.plot_kernel(mixer, steps=90, sample_rate=10.0)
    assert len(figure.axes) == 3
    for channel, axes in enumerate(figure.axes):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), wanted[:, channel], atol=1e-12)
        np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(90) / 10)
    assert figure.axes[-1].get_xlabel() == "time since the impulse (s)"
    last = plots.plot_kernel(mixer, channels=[0]).axes[0].lines[0].get_ydata()[-1]
    assert 0 < abs(last) < 0.1 * np.abs(wanted[1:, 0]).max()


def points(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(x.get_offsets()) @ [1, 1j] for x in figure.axes[0].collections]


def test_spectrum_before_and_after() -> None:
    mixer = layer()
    parameters = copy.deepcopy(mixer.state_dict())
    mixer.A_imag.data += 0.3
    before, after = points(plots.plot_spectrum(mixer, before=parameters, sample_rate=50.0))[:2]
    assert np.abs(before - after).max() > 0
    A, _, _, dt = (x.detach().numpy() for x in mixer.system())
    for found, wanted in ((after, 50 * dt[:, None] * A), (before, 50 * dt[:, None] * (A - 0.3j))):
        wanted = np.concatenate([wanted.ravel(), wanted.conj().ravel()])
        assert np.abs(found[:, None] - wanted).min(1).max() < 1e-4
        assert np.abs(found[:, None] - wanted).min(0).max() < 1e-4


def test_spectrum_on_the_disc() -> None:
    mixer = LRU(4, 5).double()
    figure = plots.plot_spectrum({"a": mixer, "b": Megalodon(4, 2)})
    found = points(figure)[0]
    wanted = torch.exp(torch.complex(-mixer.nu_log.exp(), mixer.theta_log.exp())).detach().numpy()
    assert np.abs(found[:, None] - np.concatenate([wanted, wanted.conj()])).min(0).max() < 1e-12
    assert len(found) == 10
    assert figure.axes[0].get_aspect() == 1
    disc = points(plots.plot_spectrum(layer(), plane="z"))[0]
    assert (np.abs(disc) < 1).all()


def test_memory_and_hankel_values() -> None:
    layers = {"s4d": layer(), "mamba": Mamba(3, 2)}
    figure = plots.plot_memory(layers, steps=40)
    for line, mixer in zip(figure.axes[0].lines, layers.values(), strict=True):
        wanted = linear.memory(mixer, 41)
        np.testing.assert_allclose(line.get_ydata(), wanted[1:] / wanted.max())
    values = np.stack(linear.hankel_singular_values(layers["s4d"]))
    line = plots.plot_hankel(layers["s4d"]).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.median(values / values[:, :1], 0), atol=1e-15)


@pytest.mark.parametrize(
    "draw", [plots.plot_spectrum, plots.plot_kernel, plots.plot_bode, plots.plot_memory, plots.plot_hankel]
)
def test_pictures_of_several_layers(tmp_path: Path, draw: object) -> None:
    layers = {"S5": S5(4, 6), "H3": H3(4, 4, 2), "LRU": LRU(4, 3)}
    more = {"steps": 30} if draw is plots.plot_memory else {}
    figure = draw(layers, path=tmp_path / "picture.png", **more)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(figure, Figure)
    legends = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert len(legends) == 3 and all(any(name in text for text in legends) for name in layers)
    own = Figure().subplots(2, 1)
    assert draw(layers["S5"], axes=own if draw is plots.plot_bode else own[0], **more) is own[0].figure


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="before= goes with one layer, and 2 came"):
        plots.plot_spectrum({"a": layer(), "b": layer()}, before=layer())
    with pytest.raises(ValueError, match=r"plane='w'\): there is no such plane"):
        plots.plot_spectrum(layer(), plane="w")
    with pytest.raises(ValueError, match="Mamba is not a linear time-invariant system"):
        plots.plot_bode(Mamba(4))
    gated = S4D(2, 4)
    assert isinstance(gated.output, nn.Module) and plots.plot_kernel(gated).axes
