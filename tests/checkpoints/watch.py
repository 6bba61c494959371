"""What tests of damaged folders share: copies to damage, and a watch over what a refusal costs."""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what a dispatch mode imports at its first use, which is not to be counted below

LIMIT = 50 * 2**20  # bytes


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a folder's files into another, and return that."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@contextmanager
def little() -> Iterator[None]:
    """Fail when Python or torch allocates a lot, the process grows by a lot, or all this takes long."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    tracemalloc.start()
    try:
        with _Watch():
            yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert peak < LIMIT and grown < 2 * LIMIT, f"{peak} bytes by Python, {grown} by the process"
        assert time.monotonic() - begin < 20, "a refusal took long"


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                assert x.numel() * x.element_size() < LIMIT, f"{func} made {list(x.shape)}"
        return result
