"""Triton's interpreter, with scans of whole slices, and loops whose bounds are computed, which newer NumPy breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def mended() -> Iterator[None]:
    """Scan slice by slice where the interpreter goes number by number, which takes a hundred times as long."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with (
        mock.patch.object(interpreter, "_patch_lang_tensor", patched),
        mock.patch.object(interpreter.ScanOps, "generic_scan", _scan),
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
