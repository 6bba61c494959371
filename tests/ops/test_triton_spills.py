"""Kernels compiled for a GPU that is not there, at the sizes of models: all that a program holds is in registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from targets import compiling, resources

pytestmark = pytest.mark.compiled
pytest.importorskip("triton")


def short_convolution(dtype: torch.dtype = torch.bfloat16, taps: int = 4) -> None:
    from longstate.ops.convolution import triton

    u, weight = torch.empty(1, 300, 2048, dtype=dtype), torch.empty(2048, taps, dtype=dtype)
    marks = torch.zeros(1, 300, dtype=torch.bool)
    given = (u, weight, weight[:, 0], u[:, : taps - 1], marks, None, True)
    y, final = triton.short(*given)
    triton.short_backward(y, final, *given)


def rms_norm(dtype: torch.dtype = torch.bfloat16, width: int = 4096) -> None:
    from longstate.ops.norm import triton

    x = torch.empty(40, width, dtype=dtype)
    given = (x, x[0], x, 1e-5, 1, 0.0, False)
    triton.rms_norm_backward(triton.rms_norm(*given), *given)


def vandermonde(states: int = 64) -> None:
    from longstate.ops.vandermonde import triton

    weights, log_base = (torch.zeros(2, states, dtype=dtype) for dtype in (torch.complex64, torch.complex128))
    triton.vandermonde_backward(triton.vandermonde(weights, log_base, 16_384), weights, log_base)


def token(rows: int) -> None:
    """The products of a layer's token: with norm and convolution, and with a gated norm and the residual stream."""
    from longstate.ops.linear.triton import Norm, Taps, product

    x, weight = (torch.empty(n, 2048, dtype=torch.bfloat16) for n in (rows, 4096))
    taps = Taps(weight[:, :4].contiguous(), weight[:, 0].contiguous(), torch.empty(rows, 3, 4096, dtype=x.dtype), 0)
    product(x, weight, None, None, x.dtype, Norm(weight[0], None, 1e-5, 1, 0.0, False), taps)
    product(x, weight, None, None, x.dtype, Norm(weight[0], x, 1e-5, 1, 0.0, False), residual=torch.empty(rows, 4096))


CASES = {
    "short convolution": short_convolution,
    "short convolution, float32": lambda: short_convolution(torch.float32),
    "short convolution, 8 taps": lambda: short_convolution(taps=8),
    "norm": rms_norm,
    "norm, float32": lambda: rms_norm(torch.float32),
    "token": lambda: token(1),
    "token of 8 sequences": lambda: token(8),
    "wide norm": lambda: rms_norm(width=16384),
    "wide norm, float32": lambda: rms_norm(torch.float32, width=8192),
    "vandermonde": vandermonde,
    "vandermonde, 32 states": lambda: vandermonde(32),
}


@pytest.mark.parametrize("start", CASES.values(), ids=CASES)
def test_nothing_is_spilled(start: Callable[[], None]) -> None:
    with compiling() as found:
        start()
    assert len(found) == 2
    for binary in found:
        assert "STACK:0 " in resources(binary), (binary.name, resources(binary))
        assert binary.shared < 113 * 1024, "two programs go side by side"
