"""What a program takes: each kernel reads some types, laid out in one way, of widths that go together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longstate import native
from longstate.ops._program import Place, Product, Program, Unfit
from longstate.ops._program_cpu import compiled

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

FLOAT, HALF, NARROW, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


def t(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def strided(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, 2)[..., 0]


def linear(p: Program, x: Place, **given: Any) -> Any:
    product = {"weight": t(6, 8), "bias": t(6), "scale": None} | given
    dtype = product.pop("dtype", None)
    return p.linear(x, Product(**product), dtype)


def norm(p: Program, x: Place, weight: torch.Tensor | None) -> Any:
    return p.rms_norm(x, weight, eps=1e-5, groups=1, offset=0.0, norm_before_gate=False)


def short(p: Program, x: Place, window: torch.dtype = FLOAT, **given: Any) -> Any:
    return p.short_convolution(x, **({"weight": t(8, 4), "bias": t(8)} | given), window=p.carried(window))


def scan(p: Program, x: Place, state: torch.dtype = FLOAT, **given: Any) -> Any:
    B, C = p.given(5, x.dtype), p.given(5, x.dtype)
    rest = {"dt_bias": t(8), "A_log": t(8, 5), "D": t(8)} | given
    return p.selective_scan(x, x, B=B, C=C, gate=x, state=p.carried(state), **rest)


def steps(p: Program, x: Place, **given: Any) -> Any:
    return p.head_steps(x, **({"bias": t(8), "A_log": t(8)} | given), limit=(0.0, 1.0))


def attention(p: Program, x: Place, D: torch.Tensor, state: torch.dtype = FLOAT) -> Any:
    heads = p.given(2, FLOAT)
    return p.linear_attention(x, x, x, heads, heads, D, 1, p.carried(state))


INT8 = {"weight": t(6, 8, dtype=torch.int8), "scale": t(6, 2)}
FIT: list[Callable[[Program, Place], Any]] = [
    linear,
    lambda p, x: linear(p, x, bias=None),
    lambda p, x: linear(p, x, bias=t(6, dtype=NARROW), dtype=FLOAT),
    lambda p, x: linear(p, x, **INT8),
    lambda p, x: norm(p, x, None),
    lambda p, x: norm(p, x, t(8)),
    lambda p, x: norm(p, x, t(8, dtype=NARROW)),
    short,
    lambda p, x: short(p, x, bias=None),
    scan,
    lambda p, x: scan(p, x, A_log=t(8, 5, dtype=NARROW), D=t(8, dtype=NARROW)),
    steps,
    lambda p, x: attention(p, x, t(2)),
    lambda p, x: attention(p, x, t(8, dtype=NARROW)),
]
UNFIT: list[Callable[[Program, Place], Any]] = [
    lambda p, x: linear(p, x, weight=t(6, 7)),
    lambda p, x: linear(p, x, weight=t(6, 8, dtype=NARROW)),
    lambda p, x: linear(p, x, weight=t(6, 8), scale=t(6, 2)),
    lambda p, x: linear(p, x, bias=t(6, dtype=NARROW)),
    lambda p, x: linear(p, x, bias=t(6, dtype=HALF), dtype=FLOAT),
    lambda p, x: linear(p, x, weight=strided(6, 8)),
    lambda p, x: linear(p, x, bias=strided(6)),
    lambda p, x: linear(p, x, **INT8 | {"scale": strided(6, 2)}),
    lambda p, x: linear(p, x, **INT8 | {"scale": t(6, 2, dtype=DOUBLE)}),
    lambda p, x: norm(p, x, t(8, dtype=HALF)),
    lambda p, x: norm(p, x, strided(8)),
    lambda p, x: short(p, x, NARROW),
    lambda p, x: short(p, x, weight=t(8, 4, dtype=NARROW)),
    lambda p, x: short(p, x, bias=t(8, dtype=NARROW)),
    lambda p, x: short(p, x, weight=strided(8, 4)),
    lambda p, x: short(p, x, bias=strided(8)),
    lambda p, x: scan(p, x, A_log=t(8, 5, dtype=DOUBLE)),
    lambda p, x: scan(p, x, D=t(8, dtype=DOUBLE)),
    lambda p, x: scan(p, x, A_log=strided(8, 5)),
    lambda p, x: scan(p, x, D=strided(8)),
    lambda p, x: scan(p, x, NARROW),
    lambda p, x: steps(p, x, bias=t(8, dtype=DOUBLE)),
    lambda p, x: steps(p, x, A_log=t(8, dtype=DOUBLE)),
    lambda p, x: steps(p, x, bias=strided(8)),
    lambda p, x: steps(p, x, A_log=strided(8)),
    lambda p, x: attention(p, x, t(2, dtype=DOUBLE)),
    lambda p, x: attention(p, x, strided(2)),
    lambda p, x: attention(p, x, t(2), NARROW),
    lambda p, x: linear(p, x, bias=t(7)),
    lambda p, x: norm(p, x, t(7)),
    lambda p, x: short(p, x, weight=t(7, 4), bias=t(7)),
    lambda p, x: scan(p, x, dt_bias=t(7), A_log=t(7, 5), D=t(7)),
    lambda p, x: scan(p, x, A_log=t(8, 4)),
    lambda p, x: steps(p, x, bias=t(7), A_log=t(7)),
    lambda p, x: attention(p, x, t(3)),
]


@pytest.mark.parametrize("add", FIT, ids=range(len(FIT)))
def test_what_kernels_compute_is_added(add: Callable[[Program, Place], Any]) -> None:
    program = Program(1)
    add(program, program.given(8, FLOAT))
    assert len(program.calls) == 1 and compiled(program) is not None


@pytest.mark.parametrize("add", UNFIT, ids=range(len(UNFIT)))
def test_what_they_do_not_compute_is_refused(add: Callable[[Program, Place], Any]) -> None:
    program = Program(1)
    with pytest.raises(Unfit):
        add(program, program.given(8, FLOAT))
    assert not program.calls


def test_a_kernel_of_fewer_taps_is_refused() -> None:
    assert native.kernels is not None
    for taps, fits in ((native.kernels.MOST_TAPS, True), (native.kernels.MOST_TAPS + 1, False)):
        program = Program(1)
        short(program, program.given(8, FLOAT), weight=t(8, taps))
        with nullcontext() if fits else pytest.raises(Unfit):
            compiled(program)


def test_a_program_has_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.kernels is not None
    found: list[int] = []
    record = SimpleNamespace(add=lambda name, *numbers: found.append(numbers[4]))
    monkeypatch.setattr(native, "kernels", SimpleNamespace(Program=lambda room: record))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            program = Program(1)
            linear(program, program.given(8, FLOAT))
            compiled(program)
    finally:
        torch.set_num_threads(before)
    assert found == [1, 3]
