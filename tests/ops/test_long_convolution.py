"""Long convolutions of rows of several sequences, with kernels shorter than what their sequences are halved into."""

from __future__ import annotations

import pytest
import torch

from longstate import ops


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
