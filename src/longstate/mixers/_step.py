"""One token of each of a few sequences through modules, as a program of compiled kernels.

A mixer that can be run so writes the lines of its ``forward`` down once more in ``_step``, which adds them to a
program.
"""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, contains, is_
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as _global_hooks

from .._shapes import Tensor
from ..ops import _program
from ..ops._program import Carried as Carried
from ..ops._program import Place as Place
from ..ops._register import unobserved
from ._parts import RMSNorm, looked_at, product_of, taps_of

Value = TypeVar("Value")

_ASKED = (Tensor.data_ptr, Tensor.size, Tensor.stride, attrgetter("dtype"))
_NORM = ("eps", "groups", "offset", "norm_before_gate")


def _fit(value: Value | None) -> Value:
    if value is None:
        raise _program.Unfit
    return value


class Step(_program.Program):
    """A program, and what it was made from: by it one knows whether the program still holds."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        # Lists beside each other, so that nothing but C loops over them.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[Any] = []
        self._own: list[dict[str, Any]] = []
        self._tensors: list[Tensor] = []
        self._geometry: list[list[Any]] = []

    def project(self, owner: nn.Module, name: str, x: Place, dtype: torch.dtype | None = None) -> Place:
        """Add a linear layer, whose result is of that type, or that of its input."""
        product = product_of(self.module(owner, name))
        return self.linear(x, _fit(product), dtype)

    def norm(self, owner: nn.Module, name: str, x: Place, gate: Place | None = None) -> Place:
        """Add a norm, or nothing where an identity stands in its place."""
        module = self.module(owner, name)
        if type(module) is nn.Identity:
            return x
        if type(module) is not RMSNorm:
            raise _program.Unfit
        options = {option: self._option(module, option) for option in _NORM}
        return self.rms_norm(x, module.weight, gate, **options)

    def convolve(self, owner: nn.Module, name: str, u: Place, window: Carried) -> Place:
        """Add a short convolution with SiLU."""
        module = self.module(owner, name)
        self._option(module, "activation")
        return self.short_convolution(u, *_fit(taps_of(module)), window)

    def module(self, owner: nn.Module, name: str) -> nn.Module:
        """Return a module, whose parameters the program may read as long as nobody looks at its calls."""
        module = _fit(owner._modules[name])
        if looked_at(module):
            raise _program.Unfit
        self._see(owner._modules, name, module)
        self._hooks += (module._forward_hooks, module._forward_pre_hooks)
        self._own.append(vars(module))
        for kept in (module._parameters, module._buffers):
            for leaf, x in kept.items():
                self._see(kept, leaf, x)
                if x is None:
                    continue
                if not x.is_cpu or not x.is_contiguous() or not unobserved(x):
                    raise _program.Unfit
                self._tensors.append(x)
        return module

    def finish(self) -> Any:
        """Return the compiled program, and take note of where it finds its tensors."""
        self._geometry = self._found()
        return super().finish()

    def holds(self) -> bool:
        """Return whether nothing has changed that the program was made from; asked for every token and layer."""
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and not any(self._hooks)
            and not _global_hooks()
            and not any(map(contains, self._own, repeat("forward")))
            and self._found() == self._geometry
        )

    def _found(self) -> list[list[Any]]:
        return [list(map(ask, self._tensors)) for ask in _ASKED]

    def _see(self, owner: dict[str, Any], name: str, value: Any) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(value)

    def _option(self, module: nn.Module, name: str) -> Any:
        value = vars(module)[name]
        self._see(vars(module), name, value)
        return value
