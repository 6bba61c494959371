"""Triton's interpreter, made to compute as GPUs do where it does not by itself, and in less time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Round to bfloat16's nearest number, where the interpreter cuts off; loop to bounds that are computed, which NumPy
    2.4 refuses; scan slice by slice, where it goes number by number; put its functions in the place of Triton's once a
    kernel, not at each call of a helper, which took a third of the time; let what is no number be one quietly."""
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

    patch_all = interpreter._patch_lang

    def patch(function: Any) -> Any:
        new = tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load)
        return patch_all(function) if new else interpreter._LangPatchScope()

    interpreter._convert_float = convert
    interpreter._patch_lang = patch
    interpreter._patch_lang_tensor = patched
    interpreter.ScanOps.generic_scan = _scan
    np.seterr(all="ignore")


def _scan(self: Any, given: Any) -> list[Any]:
    inputs = [np.moveaxis(x.handle.data, self.axis, 0) for x in given]
    outputs = [x.copy() for x in inputs]
    for i in range(1, len(inputs[0])):
        before = (self.to_tensor(x[i - 1], y.dtype) for x, y in zip(outputs, given, strict=True))
        now = (self.to_tensor(x[i], y.dtype) for x, y in zip(inputs, given, strict=True))
        for x, joined in zip(outputs, self.combine_fn.fn(*before, *now), strict=True):
            x[i] = joined.handle.data
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), y.dtype) for x, y in zip(outputs, given, strict=True)]
