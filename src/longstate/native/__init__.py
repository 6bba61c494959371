"""The compiled CPU kernels: loaded if this installation has them, and if not, why."""

from __future__ import annotations

from types import ModuleType

import torch

from .._shapes import Tensor

kernels: ModuleType | None = None
reason = ""
try:
    from . import _native as _loaded  # after torch, whose pool of threads it shares

    kernels = _loaded
except ImportError as error:
    reason = (
        "the package was installed without a C++ compiler"
        if isinstance(error, ModuleNotFoundError)
        else f"the kernels do not load here ({error})"
    )


def instructions() -> str:
    """Return the name of the instruction set in use: "baseline", "avx2" or "avx512"; "" without kernels."""
    return "" if kernels is None else str(kernels.instructions())


def address(x: Tensor | None) -> int:
    """Return where a tensor's numbers begin; 0 for none."""
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    """Return the number of threads to use: as many as torch does."""
    return torch.get_num_threads()
