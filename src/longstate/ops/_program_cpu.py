"""A program of ops on the CPU: its compiled kernels one after the other, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import native
from .._shapes import Tensor
from ._program import Carried, Place, Program, Unfit
from .linear.cpu import KINDS
from .linear_attention.cpu import TILE as STEPS
from .norm.cpu import rounds
from .selective_scan.cpu import TILE

Numbers = tuple[Any, ...]

_NONE = (0, 0, 0, False)


def there() -> bool:
    """Return whether there are kernels."""
    return native.kernels is not None


def run(threads: int, *arguments: Any) -> None:
    """Run compiled programs one after the other, each followed by the addresses that it asks for."""
    assert native.kernels is not None
    native.kernels.run(threads, *arguments)


def compiled(program: Program) -> Any:
    """Return the compiled program: its ``run`` takes addresses.

    Raises:
        Unfit: If the kernels do not compute what is in it.
    """
    assert native.kernels is not None
    threads = native.threads()
    made = native.kernels.Program(program.room)
    for name, given, results in program.calls:
        made.add(name, *_NUMBERS[name](program.batch, threads, *results, **given))
    return made


def _rows(x: Place | None) -> Numbers:
    """Return how a kernel finds rows."""
    return _NONE if x is None else ((x.address, x.offset), x.apart, x.apart, x.dtype is torch.bfloat16)


def _linear(
    batch: int, threads: int, y: Place, x: Place, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Numbers:
    outputs, inputs = weight.shape
    groups = 1 if scale is None else scale.shape[1]
    scales = _NONE if scale is None else (scale.data_ptr(), 0, groups, scale.dtype is torch.bfloat16)
    sizes = (batch, 1, inputs, outputs, threads, KINDS[weight.dtype], inputs // groups)
    return *sizes, *_rows(x), weight.data_ptr(), inputs, *scales, *native.vector(bias), *_rows(y)


def _rms_norm(
    batch: int,
    threads: int,
    y: Place,
    x: Place,
    weight: Tensor | None,
    gate: Place | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> Numbers:
    rounded = rounds(weight, gate is not None and norm_before_gate, offset)
    sizes = (batch, 1, x.width, groups, not norm_before_gate, rounded, threads, eps, offset)
    return *sizes, *_rows(x), *native.vector(weight), *_rows(gate), *_rows(y)


def _short_convolution(
    batch: int, threads: int, y: Place, u: Place, weight: Tensor, bias: Tensor | None, window: Carried
) -> Numbers:
    assert native.kernels is not None
    width, taps = weight.shape
    if taps > native.kernels.MOST_TAPS:
        raise Unfit
    rows = ((taps - 1) * width, width, u.dtype is torch.bfloat16)
    given = (batch, 1, width, taps, True, threads, *_rows(u), *native.matrix(weight), *native.vector(bias))
    return *given, (window.before, 0), *rows, 0, 0, *_rows(y), (window.after, 0), *rows


def _selective_scan(
    batch: int,
    threads: int,
    y: Place,
    u: Place,
    dt: Place,
    dt_bias: Tensor | None,
    A_log: Tensor,
    B: Place,
    C: Place,
    D: Tensor,
    gate: Place,
    state: Carried,
) -> Numbers:
    sizes = (batch, 1, *A_log.shape, TILE, True, True, threads)
    rows = [n for x in (u, dt, gate, B, C) for n in _rows(x)]
    vectors = (*native.matrix(A_log), *native.vector(D), *native.vector(dt_bias))
    return *sizes, *rows, *vectors, (state.before, 0), 0, 0, *_rows(y), (state.after, 0), 0


def _head_steps(
    batch: int,
    threads: int,
    step: Place,
    decay: Place,
    x: Place,
    bias: Tensor,
    A_log: Tensor,
    limit: tuple[float, float],
) -> Numbers:
    given = (*_rows(x), *native.vector(bias), *native.vector(A_log))
    return batch, x.width, *map(float, limit), *given, *_rows(step), *_rows(decay)


def _linear_attention(
    batch: int,
    threads: int,
    y: Place,
    q: Place,
    k: Place,
    v: Place,
    log_decay: Place,
    dt: Place,
    D: Tensor,
    groups: int,
    state: Carried,
) -> Numbers:
    heads = dt.width
    sizes = (batch, 1, groups, heads, q.width // groups, v.width // heads, 1, len(D) // heads, False, STEPS, threads)
    rows = [n for x in (q, k, v, log_decay, dt) for n in _rows(x)]
    return *sizes, *rows, *native.vector(D), (state.before, 0), 0, *_rows(y), (state.after, 0), 0


def _sum(batch: int, threads: int, y: Place, x: Place, z: Place, factor: float) -> Numbers:
    return batch, x.width, factor, *_rows(x), *_rows(z), *_rows(y)


_NUMBERS: dict[str, Callable[..., Numbers]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "short_convolution": _short_convolution,
    "selective_scan": _selective_scan,
    "head_steps": _head_steps,
    "linear_attention": _linear_attention,
    "add": _sum,
}
