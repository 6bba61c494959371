"""How things are measured: in turn, round by round, beside the speed of memory (used by ``cpu.py``)."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longstate import native

# Largest difference from ours in float32, as a share of the largest number: beyond it, it is another model. Much
# cancels in the gradients of decays, which are sums over time.
TOLERANCE = {"float32": 2e-5, "f32": 2e-5, "f16": 2e-3, "bfloat16": 2e-2, "int8": 1e-1, "gradient": 2e-4}


def rounds(
    contenders: Mapping[Any, Callable[[], float | None]], repeats: int, once: Sequence[object] = ()
) -> dict[Any, list[float]]:
    """Measure all in turn; a contender returns what it measured, or None: then it is the seconds that it took."""
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for i in range(-1, repeats):
        for name, call in contenders.items():
            if i >= 0 if name not in once else i == 0:
                begin = time.perf_counter()
                measured = call()
                times[name].append(time.perf_counter() - begin if measured is None else measured)
            elif name not in once:
                call()
    return times


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Return the median, the least and the most."""
    values = sorted(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (once)"
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}–{values[-1]:.{digits}f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=False))


def table(*rows: Sequence[object]) -> None:
    """Print a Markdown table, the head first."""
    head, *body = rows
    for row in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def difference(found: torch.Tensor, ours: torch.Tensor, dtype: str) -> str:
    """Return max |found − ours| / max |ours|, and refuse if it is not the same function."""
    value = float((found.float() - ours.float()).abs().max() / ours.float().abs().max())
    if not value <= TOLERANCE[dtype]:
        raise SystemExit(f"not the same outputs: they differ by {value:.2g} in {dtype}")
    return f"{value:.1e}"


def timed(call: Callable[..., object], *arguments: object) -> Callable[[], None]:
    """Return a call that gives nothing back, so that the time it takes is what is measured."""

    def measured() -> None:
        call(*arguments)

    return measured


def read_bandwidth(buffer: mmap.mmap) -> float:
    """Return the bytes a second at which a buffer is read, by the fastest of several ways."""
    x = torch.frombuffer(buffer, dtype=torch.float32)
    ones, total, pieces = torch.ones(8192), torch.empty(1), np.array_split(x.numpy(), 8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        ways: list[Callable[[], object]] = [
            x.sum,
            partial(torch.mv, x.view(-1, 8192), ones),
            partial(torch.dot, x, x),
            lambda: list(pool.map(np.max, pieces)),
        ]
        if native.kernels is not None:
            numbers = (x.data_ptr(), x.numel(), torch.get_num_threads(), total.data_ptr())
            ways.append(partial(native.kernels.read_memory, *numbers))
        return len(buffer) / min(min(x) for x in rounds(dict(enumerate(map(timed, ways))), 2).values())


def memory(size: int) -> mmap.mmap:
    """Return so much memory, all pages present, in huge ones where there are."""
    buffer = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(buffer, dtype=torch.float32).fill_(1)
    return buffer


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the weights that a token reads: of an embedding only what the head shares with it."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name in ("weight", "quantized", "scale"):
        tensors.pop(f"backbone.embedding.{name}", None)
    return sum(x.numel() * x.element_size() for x in tensors.values())


def peak() -> int:
    """Return the most bytes of memory that this process has had."""
    # Not getrusage: a process begins with its parent's peak there.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
