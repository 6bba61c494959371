"""One token of each of a few sequences through modules, as a program of ops.

A mixer that can be run so writes the lines of its ``forward`` down once more in ``_write_token``, which adds them to a
program.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import contains, eq, is_
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as _global_hooks
from torch.utils.hooks import RemovableHandle

from .._shapes import Tensor
from ..ops import _program
from ..ops._program import Carried as Carried
from ..ops._program import Place as Place
from ..ops._register import unobserved
from ._parts import RMSNorm, looked_at, product_of, taps_of

Value = TypeVar("Value")

_CPU = torch.device("cpu")

# What tells a tensor's memory from another's, and from other views of the same.
_MEMORY: tuple[Callable[[Tensor], Any], ...] = (Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous)
_NORM = ("eps", "groups", "offset", "norm_before_gate")


def fit(value: Value | None) -> Value:
    """Return what is there.

    Raises:
        Unfit: If it is not.
    """
    if value is None:
        raise _program.Unfit
    return value


class Watch:
    """What programs were made from, by which one knows whether they still hold.

    It is asked for every token and all layers, when the weights have just passed through the caches: so these are
    lists beside each other, over which nothing but C loops. A tensor is the same if it is the same object at the same
    address, as large, and contiguous if it was.

    Args:
        device: Where all tensors are.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[Any] = []
        self._own: list[dict[str, Any]] = []
        self._tensors: list[Tensor] = []

    def see(self, owner: dict[str, Any], name: str) -> Any:
        """Return an entry of a module's dictionaries."""
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(owner.get(name))
        return owner.get(name)

    def module(self, owner: nn.Module, name: str) -> nn.Module:
        """Return a module, whose parameters a program may read as long as nobody looks at its calls.

        Raises:
            Unfit: If there is none, or somebody does, or what it holds is no plain tensor.
        """
        module = fit(self.see(owner._modules, name))
        self._hooks += (module._forward_hooks, module._forward_pre_hooks)
        self._own.append(vars(module))
        for kept in (module._parameters, module._buffers):
            for leaf in kept:
                if self.see(kept, leaf) is not None:
                    self._tensors.append(kept[leaf])
        tensors = (*module._parameters.values(), *module._buffers.values())
        if looked_at(module) or not all(x is None or (x.device == self._device and unobserved(x)) for x in tensors):
            raise _program.Unfit
        if any(isinstance(x, Tensor) for x in vars(module).values()):  # in the place of a parameter, but not watched
            raise _program.Unfit
        return module

    def remember(self) -> None:
        """Take what is there now for what is to stay."""
        self._registered, self._found = RemovableHandle.next_id, self._find()
        self._memory = [list(map(ask, self._tensors)) for ask in _MEMORY]

    def nbytes(self) -> int:
        """Return the size of all tensors."""
        return sum(x.nbytes for x in self._tensors)

    def holds(self) -> bool:
        """Return whether nothing has changed."""
        if RemovableHandle.next_id != self._registered or any(self._found):  # hooks were added, or may be gone
            if self._find() != self._found:
                return False
            self._registered = RemovableHandle.next_id
        elif any(map(contains, self._own, repeat("forward"))):
            return False
        same = all(map(is_, map(dict.get, self._owners, self._names), self._values))
        return same and all(
            all(map(eq, map(ask, self._tensors), found)) for ask, found in zip(_MEMORY, self._memory, strict=True)
        )

    def _find(self) -> list[bool]:
        return [bool(_global_hooks()), *map(bool, self._hooks), *map(contains, self._own, repeat("forward"))]


class Step(_program.Program):
    """A program of modules.

    Raises:
        Unfit: Here and in all methods, if the kernels do not compute what is to be added.
    """

    def __init__(self, batch: int, watch: Watch) -> None:
        super().__init__(batch)
        self.watch = watch

    def project(self, owner: nn.Module, name: str, x: Place) -> Place:
        """Add a linear layer."""
        return self.linear(x, fit(product_of(self.watch.module(owner, name))))

    def norm(self, owner: nn.Module, name: str, x: Place, gate: Place | None = None, last: bool = False) -> Place:
        """Add a norm, or nothing where an identity stands in its place."""
        module = self.watch.module(owner, name)
        if type(module) is nn.Identity:
            return x
        if type(module) is not RMSNorm:
            raise _program.Unfit
        options = {option: self.watch.see(vars(module), option) for option in _NORM}
        return self.rms_norm(x, module.weight, gate, **options, last=last)

    def convolve(self, owner: nn.Module, name: str, u: Place, window: Carried) -> Place:
        """Add a short convolution with SiLU."""
        module = self.watch.module(owner, name)
        self.watch.see(vars(module), "activation")
        return self.short_convolution(u, *fit(taps_of(module)), window)
