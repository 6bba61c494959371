"""Long convolutions with kernels shorter than what their sequences are cut into."""

from __future__ import annotations

import pytest
import torch

from longstate import ops
from longstate.ops.convolution import chunked
from ops.test_calls import Watch


@pytest.mark.parametrize(("length", "taps"), [(150, 65), (140, 69), (70, 80)])
def test_kernels_shorter_than_half_a_row(taps: int, length: int) -> None:
    u, kernel = torch.randn(1, length, 1, dtype=torch.float64), torch.randn(1, taps, dtype=torch.float64)
    start, results = torch.rand(1, length) < 0.01, []
    for backend in ("reference", "chunked"):
        x, k = u.clone().requires_grad_(), kernel.clone().requires_grad_()
        y, final = ops.convolution.long(x, k, start=start, backend=backend)
        results.append((y, final, *torch.autograd.grad(y.square().sum(), (x, k))))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert (got - wanted).abs().max() < 1e-10 * wanted.abs().max()


@pytest.mark.parametrize(("length", "taps"), [(2000, 100), (1999, 65), (600, 599)])
def test_blocks_of_a_long_sequence(length: int, taps: int) -> None:
    """Beside torch's own convolution, which multiplies and adds."""
    u, kernel, initial = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, length, 3), (3, taps), (2, taps - 1, 3))
    )
    size, new = chunked._block(torch.cat([initial, u], 1), kernel)
    assert (new < length) == (taps < 599)
    assert size - new == taps - 1
    y, _ = ops.convolution.long(u, kernel, initial, backend="chunked")
    wanted = torch.nn.functional.conv1d(torch.cat([initial, u], 1).mT, kernel.flip(1)[:, None], groups=3).mT
    weights, given = torch.randn_like(y), (u, kernel, initial)
    got, truth = (torch.autograd.grad(x, given, weights) for x in (y, wanted))
    for a, b in zip((y, *got), (wanted, *truth), strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


@pytest.mark.parametrize(("length", "taps"), [(150, 65), (70, 200), (128, 129)])
def test_channels_in_blocks(monkeypatch: pytest.MonkeyPatch, taps: int, length: int) -> None:
    """However few are transformed at once, every one is what it is in a block of all."""
    u, kernel = torch.randn(2, length, 5, dtype=torch.float64), torch.randn(5, taps, dtype=torch.float64)
    initial, results = torch.randn(2, taps - 1, 5, dtype=torch.float64), []
    for limit in (1 << 26, 2000, 1):
        monkeypatch.setattr(chunked, "AT_ONCE", limit)
        given = [x.clone().requires_grad_() for x in (u, kernel, initial)]
        y, final = ops.convolution.long(*given)
        results.append((y, final, *torch.autograd.grad(y.square().sum() + final.sum(), given)))
    wanted = ops.convolution.long(u, kernel, initial, backend="reference")
    assert (results[0][0] - wanted[0]).abs().max() < 1e-10 * wanted[0].abs().max()
    for got in results[1:]:
        for x, y in zip(got, results[0], strict=True):
            assert (x - y).abs().max() < 1e-12 * y.abs().max()


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside inputs and outputs, transforms and spectra of a block of channels at twice the length."""
    u, kernel = torch.randn(2, 4096, 16), torch.randn(16, 4096)
    padded, grad = torch.nn.functional.pad(u, (0, 0, 4095, 0)), torch.randn(2, 4096, 16)
    for blocks, forward, backward in ((1, 10, 14), (8, 5, 10)):  # inputs are among them where they are cut
        monkeypatch.setattr(chunked, "AT_ONCE", 2 * 8192 * 16 // blocks)
        with Watch() as watch:
            chunked.long(padded, kernel, None)
        assert watch.peak < forward * u.nbytes
        with Watch() as watch:
            chunked.long_backward(grad, padded, kernel, None)
        assert watch.peak < backward * u.nbytes
