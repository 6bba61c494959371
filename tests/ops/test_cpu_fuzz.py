"""Compiled kernels on random sizes, types, flags and memory layouts, beside the reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longstate import native, ops
from ops.test_against_reference import flags, largest_error, run

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

SEEDS = range(60)


def size(r: random.Random) -> int:
    """Small, around the widths of vectors, or odd and larger."""
    return r.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 64, 100])


def layout(r: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers in another place: axes in another order in memory, and no number all around them."""
    order = r.sample(range(x.ndim), x.ndim)
    before = [r.randint(0, 2) for _ in order]
    around = [n + b + r.randint(0, 2) for n, b in zip((x.shape[i] for i in order), before, strict=True)]
    room = x.new_full(around, float("nan"))
    inside = room[tuple(slice(b, b + x.shape[i]) for i, b in zip(order, before, strict=True))]
    return inside.copy_(x.permute(order)).permute([order.index(i) for i in range(x.ndim)])


def selective_scan(r: random.Random, b: int, t: int) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    d, n = size(r), size(r)
    wide = ("A", "D", "dt_bias", "initial")
    shapes = dict(u=(b, t, d), dt=(b, t, d), A=(d, n), B=(b, t, n), C=(b, t, n), D=(d,), initial=(b, d, n))
    shapes |= dict(gate=(b, t, d), dt_bias=(d,), elapsed=(b, t))
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given["elapsed"].abs_()
    for name in ("D", "gate", "dt_bias", "elapsed"):
        if r.random() < 0.3:
            del given[name]
    given = {name: x if name in wide or r.random() < 0.5 else x.bfloat16() for name, x in given.items()}
    return ops.selective_scan, given, dict(dt_softplus=True, log_A=True)


def scan(r: random.Random, b: int, t: int) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    shape = tuple(size(r) for _ in range(r.randint(0, 2)))
    kind = torch.complex64 if r.random() < 0.5 else torch.float32
    a = torch.rand(shape if r.random() < 0.5 else (b, t, *shape)) * 0.9
    a = torch.polar(a, torch.randn_like(a)) if kind.is_complex else a
    inputs = torch.randn(b, t, *shape, dtype=kind)
    inputs = inputs.bfloat16() if not kind.is_complex and r.random() < 0.5 else inputs
    return ops.scan, dict(a=a, b=inputs, initial=torch.randn(b, *shape, dtype=kind)), {}


def some_narrow(r: random.Random, given: dict[str, torch.Tensor], optional: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Leave out some arguments that may be absent, and round some."""
    given = {name: x for name, x in given.items() if name not in optional or r.random() < 0.6}
    return {name: x if r.random() < 0.6 else x.bfloat16() for name, x in given.items()}


def linear_attention(r: random.Random, b: int, t: int) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    g, k, p = r.randint(1, 3), size(r), size(r)
    h = g * r.choice([1, 2, 5])
    decays = {"none": None, "head": (h,), "step": (b, t, h), "channel": (b, t, h, k)}
    decay = decays[r.choice(list(decays))]
    shapes = dict(q=(b, t, g, k), k=(b, t, g, k), v=(b, t, h, p), dt=(b, t, h), D=r.choice([(h,), (h, p)]))
    given = some_narrow(r, {name: torch.randn(shape) for name, shape in shapes.items()}, ("dt", "D"))
    given |= {} if decay is None else {"log_decay": -3 * torch.rand(decay)}
    return ops.linear_attention, given | ({"initial": torch.randn(b, h, k, p)} if not t or r.random() < 0.8 else {}), {}


def delta_rule(r: random.Random, b: int, t: int) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    _, given, _ = linear_attention(r, b, t)
    given.pop("D", None)
    if given.get("log_decay", torch.empty(0, 0)).ndim == 1:
        del given["log_decay"]
    given["k"] = torch.nn.functional.normalize(given["k"], dim=-1)
    given["beta"] = given.pop("dt", torch.rand(given["v"].shape[:3])).abs().clamp(max=1.9)
    return ops.delta_rule, given, {}


def short_convolution(r: random.Random, b: int, t: int) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    d, k = size(r), r.choice([1, 2, 3, 4, 4, 4, 5, 9])
    given = dict(
        u=torch.randn(b, t, d), weight=torch.randn(d, k), bias=torch.randn(d), initial=torch.randn(b, k - 1, d)
    )
    options = dict(activation=r.choice([None, "silu"]))
    return ops.convolution.short, some_narrow(r, given, ("bias", "initial")), options


def rms_norm(r: random.Random, b: int, t: int) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    groups = r.choice([1, 1, 2, 3])
    shape = (b, t, *[r.randint(1, 3)] * r.randint(0, 1), groups * size(r))
    given = dict(x=torch.randn(shape), weight=torch.randn(shape[-1]), gate=torch.randn(shape))
    options = dict(groups=groups, eps=0.1, offset=r.choice([0.0, 1.0]), norm_before_gate=r.random() < 0.5)

    def with_nothing_after(start: Any = None, valid: Any = None, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y = ops.rms_norm(**arguments)
        return y, y[:0]

    given = some_narrow(r, given, ("weight", "gate"))
    if "weight" in given:  # a narrow one meets what was rounded before
        given["weight"] = given["weight"].float()
    return with_nothing_after, given, options


def wide(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


OPS = (selective_scan, scan, linear_attention, delta_rule, short_convolution, rms_norm)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("make", OPS, ids=[make.__name__ for make in OPS])
def test_random_calls(make: Callable[..., Any], seed: int) -> None:
    """Float32: sums of a few hundred products. In bfloat16 what comes out is rounded, by 2^-9 of itself; a gradient may
    be a sum over all steps of products of two such numbers, of either sign, and small itself."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    batch, length = r.randint(1, 3), r.choice([0, 1, 2, 3, 4, 5, 31, 32, 33, 70])
    function, given, options = make(r, batch, length)
    options |= flags(r.choice(["", "start", "valid", "start valid"]), batch, length)
    wanted = run(function, {name: wide(x) for name, x in given.items()}, **options, backend="reference")
    narrow = any(x.dtype == torch.bfloat16 for x in given.values())
    placed = {name: layout(r, x) for name, x in given.items()}
    for x, y in zip(placed.values(), given.values(), strict=True):
        assert torch.equal(x, y)

    def call(**arguments: Any) -> Any:
        return function(**{name: layout(r, x) for name, x in arguments.items()}, **options, backend="cpu")

    got = run(call, given)
    many = max(1, batch * length) ** 0.5
    assert largest_error([wide(x) for x in got[:2]], wanted[:2]) < (2**-8 if narrow else 1e-5)
    assert largest_error([wide(x) for x in got[2:]], wanted[2:]) < (2**-7 * many if narrow else 2e-5)
    with torch.no_grad():
        y, final = function(**placed, **options, backend="cpu")
    assert largest_error([wide(y), wide(final)], wanted[:2]) < (2**-8 if narrow else 1e-5)
