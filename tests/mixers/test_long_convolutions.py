"""Long convolutions against their kernels written out, and the kernels against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from longstate import TNN, Hyena, LongConv, Mixer, SGConv, Timeline
from longstate.mixers.hyena import HyenaFilter
from longstate.mixers.tnn import modes_of


def causal(kernel: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """Return Σ_i k_i u_{t−i} of ``[t d]`` by NumPy."""
    k, u = kernel.detach().double().numpy(), x.detach().numpy()
    return np.stack([np.convolve(k[i], u[:, i])[: len(u)] for i in range(u.shape[1])], 1)


@pytest.mark.parametrize("length", [7, 40, 150])
@pytest.mark.parametrize(
    "mixer",
    [LongConv(3, 33, squash=0.05, kernel_dropout=0.0, output="identity"), SGConv(3, 4, 4, output="identity")],
    ids=["long_conv", "sg_conv"],
)
def test_explicit_kernels(mixer: LongConv | SGConv, length: int) -> None:
    mixer = mixer.double()
    x = torch.randn(1, length, 3, dtype=torch.float64)
    got = mixer(x)[0][0].detach().numpy()
    wanted = causal(mixer.kernel(), x[0]) + mixer.D.detach().numpy() * x[0].numpy()
    assert np.abs(got - wanted).max() < 1e-12


def test_squashing_and_dropout() -> None:
    mixer = LongConv(2, 400, squash=0.02, kernel_dropout=0.25)
    kernel = mixer.kernel()
    small = mixer.weight.abs() <= 0.02
    assert small.any() and (kernel[small] == 0).all()
    torch.testing.assert_close(kernel[~small], (mixer.weight - 0.02 * mixer.weight.sign())[~small])
    mixer.weight.data.add_(3.0)
    impulse = torch.zeros(1, 400, 2)
    impulse[0, 0] = 1
    mixer.output, mixer.D.data = torch.nn.Identity(), torch.zeros(2)
    left = (mixer(impulse)[0][0].abs() > 1e-4).double().mean().item()
    assert abs(left - 0.75) < 0.08
    torch.testing.assert_close(mixer.eval()(impulse)[0][0].T, mixer.kernel(), rtol=1e-4, atol=1e-4)


def test_the_parts_of_sgconv() -> None:
    """Each part fills as many taps as all before it, at half the weight; at first the kernel has norm 1."""
    mixer = SGConv(2, 4, 4).double()
    mixer.reset_parameters()
    kernel = mixer.kernel().detach()
    assert kernel.shape == (2, 32)
    torch.testing.assert_close(kernel.norm(dim=1), torch.ones(2, dtype=torch.float64))
    mixer.weight.data.fill_(1.0)
    levels = (mixer.kernel() * mixer.initial_norm)[0].detach()
    wanted = torch.tensor([1.0] * 4 + [0.5] * 4 + [0.25] * 8 + [0.125] * 16, dtype=torch.float64)
    torch.testing.assert_close(levels, wanted)
    mixer.weight.data[2, 0] = torch.arange(4.0)
    stretched = (mixer.kernel() * mixer.initial_norm)[0, 8:16].detach() * 4
    positions = (np.arange(8) + 0.5) / 2 - 0.5  # middles of taps
    np.testing.assert_allclose(stretched, np.interp(positions, np.arange(4), np.arange(4.0)), rtol=1e-12)


def test_hyena_written_out() -> None:
    mixer = Hyena(3, 50, d_hidden=8, bands=3).double()
    x = torch.randn(1, 70, 3, dtype=torch.float64)
    with torch.no_grad():
        projected = mixer.in_proj(x)[0]
        taps = mixer.conv1d.weight[:, 0].flip(1)
        projected = torch.from_numpy(causal(taps, projected)) + mixer.conv1d.bias
        v, first, second = projected.split(3, 1)
        kernels = mixer.filter(70)
        z = first.numpy() * (causal(kernels[:3], v) + mixer.D[0].numpy() * v.numpy())
        z = second.numpy() * (causal(kernels[3:], torch.from_numpy(z)) + mixer.D[1].numpy() * z)
        wanted = mixer.out_proj(torch.from_numpy(z))
        assert (mixer(x)[0][0] - wanted).abs().max() < 1e-12


def test_the_kernels_of_hyena() -> None:
    """Tap by tap by the formula; longer kernels begin as shorter ones do; windows fall to a hundredth."""
    net = HyenaFilter(2, 10, d_hidden=5, n_layers=2, bands=3, shift=0.01).double()
    net.frequency.data = torch.rand(5, dtype=torch.float64) + 0.5
    kernel = net(25).detach()
    torch.testing.assert_close(net(4), net(25)[:, :4], rtol=1e-13, atol=1e-13)
    for i in (0, 3, 24):
        tau = i / 10
        frequencies = [1e-4, 1e-4 + (2 - 1e-4) / 2, 2.0]
        z = [tau, *(math.cos(2 * math.pi * f * tau) for f in frequencies)]
        z = torch.tensor([*z, *(-math.sin(2 * math.pi * f * tau) for f in frequencies)], dtype=torch.float64)
        for layer in net.layers:
            z = torch.sin(net.frequency * (layer.weight @ z + layer.bias))
        window = torch.tensor([0.01 ** (tau / 1.5) + 0.01, 0.01 ** (tau / 0.3) + 0.01], dtype=torch.float64)
        torch.testing.assert_close(kernel[:, i], (net.last.weight @ z * window).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 63, 200])
def test_modes_of_a_toeplitz_matrix(count: int) -> None:
    taps = torch.randn(3, count, dtype=torch.float64)
    log_decay, weights = modes_of(taps)
    assert weights.shape == (3, (count + 1) // 2)
    powers = np.exp(log_decay.numpy()[:, None] * np.arange(2 * count + 2))
    got = 2 * (weights.numpy()[..., None] * powers).sum(1).real
    np.testing.assert_allclose(got[:, :count], taps, atol=1e-12)
    # Beyond, the one tap that makes the sum zero, and then the same again.
    np.testing.assert_allclose(got[:, count], -taps.sum(1), atol=1e-12)
    np.testing.assert_allclose(got[:, count + 1 :], got[:, : count + 1], atol=1e-12)


@pytest.mark.parametrize("steps", [40, 41, 100])
def test_a_tnn_with_state_is_the_one_without(steps: int) -> None:
    """One step at a time, in memory that does not grow: the outputs of the convolution."""
    mixer = TNN(4, 3, d_hidden=8, decay=0.97).double()
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    with torch.no_grad():
        wanted, _ = mixer(x)
        recurrent = mixer.with_state(steps)
        state, outputs = None, []
        for t in range(40):
            y, state = recurrent(x[:, t : t + 1], state)
            outputs.append(y)
        assert (torch.cat(outputs, 1) - wanted).abs().max() < 1e-12
        assert (recurrent(x)[0] - wanted).abs().max() < 1e-12
        assert wanted.std() > 1e-2
        kernel = mixer.taps(40) * 0.97 ** torch.arange(40, dtype=torch.float64)
        silu = torch.nn.functional.silu
        read = causal(kernel, silu(mixer.v_proj(x[0])))
        assert (mixer.o_proj(silu(mixer.u_proj(x[0])) * torch.from_numpy(read)) - wanted[0]).abs().max() < 1e-12


@pytest.mark.parametrize("make", [lambda: Hyena(3, 20, d_hidden=4), lambda: TNN(3, d_hidden=4)], ids=["hyena", "tnn"])
def test_documents_of_very_unequal_length(make) -> None:
    """Many of one step beside a long one, with padding: each as by itself."""
    mixer: Mixer = make().double()
    lengths = [1, 1, 120, 1, 1, 30, 1]
    x = torch.randn(1, sum(lengths) + 5, 3, dtype=torch.float64)
    start, valid = torch.zeros(x.shape[:2], dtype=torch.bool), torch.ones(x.shape[:2], dtype=torch.bool)
    valid[:, :5] = False
    outputs, begin = [torch.zeros(1, 5, 3, dtype=torch.float64)], 5
    with torch.no_grad():
        for length in lengths:
            start[:, begin] = True
            outputs.append(mixer(x[:, begin : begin + length])[0])
            begin += length
        got, _ = mixer(x, None, Timeline(start=start, valid=valid))
    assert (got - torch.cat(outputs, 1)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongConv(4, 0), "length=0"),
        (lambda: LongConv(4, squash=-1.0), "squash"),
        (lambda: LongConv(4, kernel_dropout=1.0), "dropout"),
        (lambda: SGConv(4, 0), "part=0"),
        (lambda: SGConv(4, n_scales=0), "n_scales=0"),
        (lambda: Hyena(4, order=0), "order"),
        (lambda: Hyena(4, bands=0), "bands=0"),
        (lambda: TNN(4, decay=0.0), "decay"),
        (lambda: TNN(4, state_for=0), "state_for"),
        (lambda: TNN(4).with_state(0), "state_for"),
        (lambda: TNN(4)(torch.randn(1, 2, 4), TNN(4, state_for=4).initial_state(1)), "with_state"),
    ],
)
def test_options_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
