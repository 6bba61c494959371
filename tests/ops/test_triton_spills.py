"""Kernels compiled for a GPU that is not there, at the sizes of models: all that a program holds is in registers, and
warps wait for one another where they must."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from longstate.ops import _triton
from targets import Binary, compiling, resources

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


def order(binary: Binary) -> list[str]:
    """Return a kernel's reads and writes of memory, and where its warps wait for one another."""
    return re.findall(r"\b(?:ld\.global|st\.global|cp\.async|bar\.sync)", binary.compiled.asm["ptx"])


@pytest.mark.parametrize("warps", [1, 4])
def test_steps_in_place_wait_before_they_write(warps: int) -> None:
    """Several warps may read the same numbers of a state: all of them have when one writes the next."""
    from longstate.ops.linear.triton import Taps, product
    from longstate.ops.scan import triton as scans
    from longstate.ops.selective_scan import triton as selective

    x, weight = torch.empty(1, 2048), torch.empty(4096, 2048)
    taps = Taps(weight[:, :4].contiguous(), weight[:, 0].contiguous(), torch.empty(1, 3, 4096), 0)
    with compiling() as found:
        product(x, weight, None, None, x.dtype, None, taps)
    steps = order(found[0])
    assert steps[steps.index("st.global") - 1] == "bar.sync", "the window is written first"

    u, A, B = torch.empty(2, 1, 64), torch.empty(64, 4), torch.empty(2, 1, 4)
    given = (None, torch.empty(2, 64, 4), *[None] * 4, True, True, 0)
    with compiling() as found, _triton.in_place():
        with scans.TILES.force({"warps": warps}), selective.TILES.force({"warps": warps}):
            scans.scan(u, u, torch.empty(2, 64), None, None)
            selective.selective_scan(u, u, A, B, B, *given)
    for binary in found:
        assert order(binary)[-2:] == ["bar.sync", "st.global"], "the state is written last"
