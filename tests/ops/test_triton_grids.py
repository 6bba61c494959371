"""Kernels started for very many sequences, or very many steps: only the first side of a grid may be long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from longstate import ops
from longstate.ops import _register, _triton

pytestmark = pytest.mark.compiled
pytest.importorskip("triton")
if _triton.interpreted:
    pytest.skip("nothing is started", allow_module_level=True)


@pytest.fixture
def grids() -> Iterator[list[tuple[int, ...]]]:
    """The grids of what would be started."""
    found: list[tuple[int, ...]] = []
    with mock.patch.object(_triton, "launch", lambda kernel, grid, *given, **options: found.append(grid)):
        yield found


def short(batch: int, length: int) -> None:
    from longstate.ops.convolution import triton

    u, weight = (torch.empty(shape, device="meta") for shape in ((batch, length, 8), (8, 4)))
    given = (u, weight, None, None, None, None, True)
    y, final = triton.short(*given)
    triton.short_backward(y, final, *given)


def scan(batch: int, length: int) -> None:
    from longstate.ops.scan import triton

    x = torch.empty(batch, length, 8, device="meta")
    h, final = triton.scan(x, x, None, None, None)
    triton.scan_backward(x, final, x, None, None, None, h)


def selective_scan(batch: int, length: int) -> None:
    from longstate.ops.selective_scan import triton

    u, A = torch.empty(batch, length, 8, device="meta"), torch.empty(8, 4, device="meta")
    given = (u, u, A, u[..., :4], u[..., :4])
    _, final, kept = triton.selective_scan(*given, *[None] * 6, True, True, 16)
    triton.selective_scan_backward(u, final, *given, *[None] * 5, kept, True, True, 16)


def linear_attention(batch: int, length: int, channel: bool = False) -> None:
    from longstate.ops.linear_attention import triton

    x = torch.empty(batch, length, 1, 8, device="meta")
    given = (x, x, x, x if channel else x[..., 0])
    y, final, kept = triton.linear_attention(*given, *[None] * 4, False, 128, False)
    triton.linear_attention_backward(y, final, *given, *[None] * 3, kept, False, 128)


def delta_rule(batch: int, length: int) -> None:
    from longstate.ops.delta_rule import triton

    x = torch.empty(batch, length, 1, 8, device="meta")
    given = (x, x, x, x[..., 0])
    y, final, kept = triton.delta_rule(*given, None, x[..., 0], None, 128)
    triton.delta_rule_backward(y, final, *given, x[..., 0], None, kept, 128)


def by_channel(batch: int, length: int) -> None:
    linear_attention(batch, length, True)


@pytest.mark.parametrize("start", [short, scan, selective_scan, linear_attention, by_channel, delta_rule])
@pytest.mark.parametrize(("batch", "length"), [(70_000, 40), (70_000, 1), (1, 1 << 21), (2, 1 << 20)], ids=str)
def test_grids_are_long_on_their_first_side_alone(
    start: Callable[[int, int], None], batch: int, length: int, grids: list[tuple[int, ...]]
) -> None:
    with mock.patch.object(_triton.Tiles, "__call__", lambda self, x, **sizes: dict(self.default)):
        start(batch, length)
    assert grids
    assert all(grid[0] < 1 << 31 and all(side < 1 << 16 for side in grid[1:]) for grid in grids), grids


def test_rows_that_lie_far_apart_are_copied() -> None:
    x = torch.empty(4, 1 << 22, 8, device="meta")
    assert _triton.rows(x) is x
    assert _triton.rows(x.transpose(0, 1)).stride() == (32, 8, 1)  # the steps were 32 Mi numbers apart


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_more_keys_than_there_is_memory_for(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused, and taken by another backend where none is named."""
    monkeypatch.setattr(_triton, "reason", "")
    monkeypatch.setitem(_register._BACKENDS, op, ("triton", *_register._BACKENDS[op]))
    x = torch.ones(1, 2, 1, 513, dtype=torch.float64)
    given = dict(q=x, k=x, v=x) | ({} if op == "linear_attention" else {"beta": x[..., 0]})
    with pytest.raises(ValueError, match="at most 512 keys"):
        getattr(ops, op)(**given, backend="triton")
    assert getattr(ops, op)(**given)[0].isfinite().all()
