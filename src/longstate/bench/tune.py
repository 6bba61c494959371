"""Choosing the tiles of the GPU kernels, once for each kind of GPU: what is found is shipped as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from .. import ops
from .._files import replacing
from .._shapes import Tensor
from ..ops import _triton
from ._timing import seconds

Workload = Callable[[], Any]
Table = _triton.Table

ENOUGH = 0.98  # what a choice must take of the best time so far to replace it: less is noise


def workloads(device: torch.device, small: bool = False) -> Iterator[tuple[str, Workload]]:
    """Yield calls of the ops that have kernels, in the shapes of models in training, reading and decoding.

    Args:
        device: Where to compute.
        small: Sizes for a test.
    """
    from ..ops.linear.triton import Norm, product

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def wide(*shape: int) -> Tensor:
        return randn(*shape, dtype=torch.float32)

    shapes = [(1, 11), (2, 1)] if small else [(8, 2048), (1, 32768), (64, 1)]
    d, n, h, k, p = (8, 4, 1, 8, 8) if small else (1536, 16, 24, 128, 64)
    for b, t in shapes:
        at = f"{b} × {t}"
        u, dt, gate = (randn(b, t, d) for _ in range(3))
        A, B, C, D = -torch.rand(d, n, device=device), randn(b, t, n), randn(b, t, n), wide(d)
        scan = partial(ops.selective_scan, dt_softplus=True)
        given = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, gate=gate, initial=wide(b, d, n))
        yield from _both(f"selective_scan {at}", scan, given, t)
        a = torch.rand(b, t, d, device=device)
        yield from _both(f"scan {at}", ops.scan, dict(a=a, b=wide(b, t, d), initial=wide(b, d)), t)
        turning = torch.polar(a, 3 * a)
        given = dict(a=turning, b=turning.clone(), initial=turning[:, 0].clone())
        yield from _both(f"complex scan {at}", ops.scan, given, t)
        given = dict(u=u, weight=randn(d, 4), bias=randn(d), initial=randn(b, 3, d))
        short = partial(ops.convolution.short, activation="silu")
        yield from _both(f"convolution.short {at}", short, given, t)
        yield from _both(f"rms_norm {at}", ops.rms_norm, dict(x=u, weight=randn(d), gate=gate), t)
        for kind, shape in {"step": (b, t, h), "channel": (b, t, h, k)}.items():
            for dtype in (torch.bfloat16, torch.float32):
                decay = -torch.rand(shape, device=device) / 8
                q, key, v = (normalize(randn(b, t, h, x, dtype=dtype), dim=-1) for x in (k, k, p))
                given = dict(q=q, k=key, v=v, log_decay=decay, initial=wide(b, h, k, p))
                name = f"{kind} {at}" if dtype == torch.bfloat16 else f"{kind} {at} float32"
                yield from _both(f"linear_attention {name}", ops.linear_attention, given, t)
                given = given | dict(beta=torch.rand(b, t, h, device=device))
                yield from _both(f"delta_rule {name}", ops.delta_rule, given, t)
    z = torch.complex(-torch.rand(d, n, device=device), torch.randn(d, n, device=device)).to(torch.complex128)
    powers = partial(ops.vandermonde, length=16 if small else 4096)
    for inputs, outputs in [(8, 8)] if small else [(768, 3352), (2048, 8512), (4096, 2048)]:
        for rows in (1, 8):
            weight, gain = randn(outputs, inputs), randn(inputs)
            norm = Norm(gain, None, 1e-5, 1, 0.0, False)
            token = partial(product, randn(rows, inputs), weight, None, None, torch.bfloat16, norm)
            yield f"token {rows} × {inputs} → {outputs}", token
    yield from _both("vandermonde", powers, dict(weights=z.to(torch.complex64), log_base=z), 2)


def _both(name: str, op: Callable[..., Any], given: Mapping[str, Tensor], steps: int) -> Iterator[tuple[str, Workload]]:
    """Yield an op without gradients and, but for single steps, with those of all that it is given."""

    def forward() -> None:
        with torch.no_grad():
            op(**given, backend="triton")

    def backward() -> None:
        inputs = {name: x.detach().requires_grad_() for name, x in given.items()}
        y = op(**inputs, backend="triton")
        y = y[0] if isinstance(y, tuple) else y
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), allow_unused=True)

    yield name, forward
    if steps > 1:
        yield f"{name}, backward", backward


def best(tiles: _triton.Tiles, start: Mapping[str, int], measure: Callable[[], float]) -> tuple[dict[str, int], float]:
    """Return the best choice found and its time: one size after the other is changed while that helps.

    A choice that the compiler refuses, or that the GPU has no room for, is passed over.
    """
    from triton.errors import TritonError

    def tried(choice: Mapping[str, int]) -> float:
        try:
            with tiles.force(choice):
                return measure()
        except TritonError:
            return float("inf")

    choice, least = dict(start), tried(start)
    again = True
    while again:
        again = False
        for name, values in tiles.space.items():
            for value in values:
                other = choice | {name: value}
                if other != choice and (took := tried(other)) < ENOUGH * least:
                    choice, least, again = other, took, True
    return choice, least


def tune(
    device: torch.device, only: str = "", small: bool = False, say: Callable[[str], object] = print
) -> Iterator[Table]:
    """Yield the best tiles found for the kernels of all workloads on this device, a table of one row each.

    Args:
        device: A GPU (or the CPU under Triton's interpreter, where it means nothing).
        only: A part of the names of the workloads to take.
        small: Sizes for a test.
        say: What to call with a line for each kernel.

    Raises:
        ValueError: If no kernel can run there, or no workload is called so.
    """
    if _triton.reason or not (device.type == "cuda" or _triton.interpreted):
        raise ValueError(f"tune(device={str(device)!r}): {_triton.reason or 'there is no GPU'}. Give a GPU.")
    from triton.errors import TritonError

    where = _triton.architecture(device) if device.type == "cuda" else "interpreter"
    repeats = 1 if small else 9
    found, names = set(), set()
    for name, call in workloads(device, small):
        names.add(name.split()[0])
        if only not in name:
            continue
        try:
            with _triton.asked() as asked:
                call()
        except TritonError as error:
            say(f"{name}: {type(error).__name__}: {str(error).splitlines()[-1]}")
            continue
        for tiles, sizes in asked:
            if (key := (tiles.kernel, *sizes.items())) in found or not tiles.space:
                continue
            found.add(key)
            before, why = seconds(device, call, repeats)
            start = {x: y for x, y in tiles.default.items() if x in tiles.space}
            choice, took = best(tiles, start, lambda call=call: seconds(device, call, repeats)[0])  # type: ignore[misc]
            say(f"{name}: {tiles.kernel} {sizes}: {before * 1e6:.0f} → {took * 1e6:.0f} µs with {choice} {why}")
            yield {where: {tiles.kernel: [{"sizes": sizes, "use": choice}]}}
    if not found:
        raise ValueError(f"tune(only={only!r}): no workload is called so; there are some of {', '.join(sorted(names))}")


def merged(old: Table, new: Table) -> Table:
    """Return a table with the rows of two, the new ones where both have some for a kernel and sizes."""
    result = {where: dict(kernels) for where, kernels in old.items()}
    for where, kernels in new.items():
        for kernel, rows in kernels.items():
            sizes = [row["sizes"] for row in rows]
            kept = [row for row in result.get(where, {}).get(kernel, []) if row["sizes"] not in sizes]
            result.setdefault(where, {})[kernel] = [*kept, *rows]
    return result


def write(table: Table, path: Path) -> None:
    """Write a table, a row a line."""
    lines = []
    for where, kernels in sorted(table.items()):
        rows = (
            f"  {json.dumps(kernel)}: [\n   " + ",\n   ".join(json.dumps(row) for row in rows) + "\n  ]"
            for kernel, rows in sorted(kernels.items())
        )
        lines.append(f" {json.dumps(where)}: {{\n" + ",\n".join(rows) + "\n }")
    with replacing(path) as part:
        Path(part).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
