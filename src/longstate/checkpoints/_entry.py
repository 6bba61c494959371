"""Where a tensor stands in a file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

# As safetensors writes them. Eight-bit floats are quantised: they mean nothing without their scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """One tensor in a file."""

    file: Path
    shape: list[int]
    dtype: str
    begin: int  # the byte at which it begins
