"""What every compiled kernel owes: it reads nothing that was not written, and its bits do not depend on threads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from poison import poisoned_memory


def check_threads(run: Callable[[], list[torch.Tensor]]) -> None:
    """Run on poisoned memory with 1, 2 and 5 threads, and compare the results bit for bit."""
    before, found = torch.get_num_threads(), []
    try:
        with poisoned_memory():
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(x.isfinite().all() for x in found[0])
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))
