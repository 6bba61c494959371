"""How long a call takes on a GPU, without the time that Python takes to start it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(device: torch.device, call: Callable[[], Any], repeats: int = 9) -> tuple[float, str]:
    """Return the median time of a call, and "" or why more than the kernels is in it.

    Between two events on a GPU stands the replay of a CUDA graph, after the caches have been written over.
    """
    if device.type != "cuda":
        call()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times), "no GPU"
    with torch.cuda.device(device):
        run, why = _captured(call)
        cache = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        times = []
        for _ in range(repeats):
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[assignment]
            begin.record()  # type: ignore[attr-defined]
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)  # type: ignore[attr-defined]
    return statistics.median(times), why


def _captured(call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """Return a call as a graph, or itself and why it is none."""
    outside, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(outside)
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets other libraries choose among their configurations
            call()
    outside.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            call()
    except RuntimeError as error:
        torch.cuda.set_stream(outside)  # which an unfinished capture leaves behind
        torch.cuda.synchronize()
        return call, f"(not captured: {str(error).splitlines()[0]:.60})"
    return graph.replay, ""
