"""Triton's interpreter, made to compute as GPUs do where it does not by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Round to bfloat16's nearest number, where the interpreter cuts off, and let what is no number be one quietly."""
    from triton import language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return plain(data, source, target, rounding)

    with mock.patch.object(interpreter, "_convert_float", convert), np.errstate(all="ignore"):
        yield
