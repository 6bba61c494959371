"""Triton's interpreter, made to scan slice by slice, and to compute as GPUs do where it does not by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def mended() -> Iterator[None]:
    """Scan slice by slice where the interpreter goes number by number, which takes a hundred times as long; loop to
    bounds that are computed, which newer NumPy breaks; round to bfloat16's nearest number where it cuts off."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor, plain = interpreter._patch_lang_tensor, interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return plain(data, source, target, rounding)

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with (
        mock.patch.object(interpreter, "_patch_lang_tensor", patched),
        mock.patch.object(interpreter.ScanOps, "generic_scan", _scan),
        mock.patch.object(interpreter, "_convert_float", convert),
        np.errstate(all="ignore"),
    ):
        yield


def _scan(self: Any, given: Any) -> list[Any]:
    inputs = [np.moveaxis(x.handle.data, self.axis, 0) for x in given]
    outputs = [x.copy() for x in inputs]
    for i in range(1, len(inputs[0])):
        before = (self.to_tensor(x[i - 1], y.dtype) for x, y in zip(outputs, given, strict=True))
        now = (self.to_tensor(x[i], y.dtype) for x, y in zip(inputs, given, strict=True))
        for x, joined in zip(outputs, self.combine_fn.fn(*before, *now), strict=True):
            x[i] = joined.handle.data
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), y.dtype) for x, y in zip(outputs, given, strict=True)]
