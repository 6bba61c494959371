"""One token of each of a few sequences through a block, in one call of compiled kernels.

It is what the block's own lines compute: the same kernels run in the same order (Δ alone is not rounded to bfloat16
between its product and its bias). A program is kept as long as nothing that it was made from has changed, and not used
where anybody looks on: gradients, hooks, adapters, traces.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .._shapes import Tensor
from ..mixers._step import Step
from ..ops._program import TYPES, Unfit
from ..ops._register import unobserved
from ..timeline import Timeline


class _OneToken:
    """A program for a block, and for which inputs and states it is.

    Raises:
        Unfit: If there is none.
    """

    def __init__(self, block: Any, residual: Tensor) -> None:
        if residual.dtype not in TYPES:
            raise Unfit
        self.shape, self.dtype, self.threads = residual.shape, residual.dtype, torch.get_num_threads()
        self.factor = block.residual_multiplier
        self.step = step = Step(len(residual))
        mixer: Any = step.module(block, "mixer")
        self.states = [(x.shape, x.dtype) for x in mixer.initial_state(len(residual))]
        source, result = step.given(self.shape[-1], self.dtype), step.given(self.shape[-1], self.dtype)
        carried = [step.carried(dtype) for _, dtype in self.states]
        y = mixer._step(step, step.norm(block, "norm", source), *carried)
        if torch.promote_types(self.dtype, y.dtype) is not self.dtype:
            raise Unfit
        step.add(source, y, self.factor, result)
        self.run = step.finish().run

    def fits(self, block: Any, residual: Tensor) -> bool:
        """Return whether it is the program for this block now, and for such inputs."""
        same = residual.shape == self.shape and residual.dtype is self.dtype
        same = same and block.residual_multiplier == self.factor and self.threads == torch.get_num_threads()
        return same and self.step.holds()

    def takes(self, state: tuple[Tensor, ...]) -> bool:
        """Return whether a state is what the kernels read."""
        if len(state) != len(self.states):
            return False
        for x, (shape, dtype) in zip(state, self.states, strict=True):
            if x.shape != shape or x.dtype is not dtype or not x.is_contiguous() or not x.is_cpu:
                return False
        return True


_KEPT: WeakKeyDictionary[nn.Module, _OneToken] = WeakKeyDictionary()


def one_token(
    block: nn.Module, residual: Tensor, state: Any, timeline: Timeline | None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Return the residual stream with what the mixer adds to it, and the state after; None if the block's own lines are
    to be run."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or timeline is not None or not state:
        return None
    mixer = block._modules["mixer"]
    if "_step" not in vars(type(mixer)) or residual.shape[1] != 1:
        return None
    if not unobserved(residual, *state) or torch.is_autocast_enabled("cpu"):
        return None
    if not residual.is_cpu or not residual.is_contiguous():
        return None
    found = _KEPT.get(block)
    if found is None or not found.fits(block, residual):
        try:
            found = _KEPT[block] = _OneToken(block, residual)
        except Unfit:
            _KEPT.pop(block, None)
            return None
    if not found.takes(state):
        return None
    y, after = torch.empty_like(residual), [torch.empty_like(x) for x in state]
    addresses = [residual.data_ptr(), y.data_ptr()]
    for x, z in zip(state, after, strict=True):
        addresses += (x.data_ptr(), z.data_ptr())
    found.run(*addresses)
    return y, type(state)(*after)
