"""Long convolutions of rows of several sequences, with kernels shorter than what their sequences are halved into."""

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
    for blocks, forward, backward in ((1, 8, 13), (8, 5, 8)):  # inputs are among them where they are cut
        monkeypatch.setattr(chunked, "AT_ONCE", 2 * 8192 * 16 // blocks)
        with Watch() as watch:
            chunked.long(padded, kernel, None)
        assert watch.peak < forward * u.nbytes
        with Watch() as watch:
            chunked.long_backward(grad, padded, kernel, None)
        assert watch.peak < backward * u.nbytes
