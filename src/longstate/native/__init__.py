"""The compiled CPU kernels: loaded if this installation has them, and if not, why."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch  # first: the kernels share its pool of threads

from .._shapes import Tensor

kernels: ModuleType | None = None
reason = ""
try:
    kernels = import_module(f"{__name__}._native")
except ModuleNotFoundError:
    reason = "this installation was made without a C++ compiler"
except ImportError as error:
    reason = f"the compiled kernels do not load here ({error})"


def instructions() -> str:
    """Return the name of the instruction set in use, such as "avx512"; "" without kernels."""
    return "" if kernels is None else str(kernels.instructions())


def address(x: Tensor | None) -> int:
    """Return where a tensor's numbers begin; 0 for none."""
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    """Return the number of threads to use: as many as torch does."""
    return torch.get_num_threads()


def rows(x: Tensor | None) -> tuple[int, int, int, bool]:
    """Return how a kernel finds the rows of ``[b t d]``, whose neighbours in a row lie side by side; zeros for none."""
    if x is None:
        return 0, 0, 0, False
    batch, row, _ = x.stride()
    return x.data_ptr(), batch, row, x.dtype == torch.bfloat16


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor as it is where neighbours in a row lie side by side; a copy of which it is true elsewhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
