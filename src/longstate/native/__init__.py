"""The compiled CPU kernels: loaded if this installation has them, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
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


def side_by_side(x: Tensor | None) -> Tensor | None:
    """Return a tensor's numbers in the usual order, one after the other."""
    return None if x is None else x.contiguous()


def single(x: Tensor | None) -> Tensor | None:
    """Return a parameter as the kernels read it: side by side, in float32."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def rows(x: Tensor | None) -> tuple[int, int, int, bool]:
    """Return how a kernel finds the rows of ``[b t d]``, whose neighbours in a row lie side by side; zeros for none."""
    if x is None:
        return 0, 0, 0, False
    batch, row, _ = x.stride()
    return x.data_ptr(), batch, row, x.dtype is torch.bfloat16


def matrix(x: Tensor) -> tuple[int, int, int, bool]:
    """Return how a kernel finds the rows of ``[d k]``, the same for every sequence."""
    return x.data_ptr(), 0, x.stride(0), x.dtype == torch.bfloat16


def vector(x: Tensor | None) -> tuple[int, int, int, bool]:
    """Return how a kernel finds ``[d]``, the same for every sequence and step; zeros for none."""
    return (0, 0, 0, False) if x is None else (x.data_ptr(), 0, 0, x.dtype == torch.bfloat16)


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor as it is where neighbours in a row lie side by side; a copy of which it is true elsewhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


_TYPES = (torch.float32, torch.bfloat16)


def takes(*tensors: Tensor | None) -> bool:
    """Return whether all tensors are of a type that kernels read, and in the memory of the CPU."""
    for x in tensors:  # a loop, since this is asked many times for each token
        if x is not None and not (x.dtype in _TYPES and x.is_cpu):
            return False
    return True


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for a result; a large one in large pages, whose first use costs a third."""
    x = torch.empty(shape, dtype=dtype)
    if kernels is not None and x.nbytes >= 1 << 22:
        kernels.advise(x.data_ptr(), x.nbytes)
    return x


def like(x: Tensor) -> Tensor:
    """Return memory for a result of the shape and type of ``x``, in the usual order; a small one in half the time."""
    return torch.empty_like(x) if x.is_contiguous() and x.numel() < 1 << 20 else empty(x.shape, x.dtype)
