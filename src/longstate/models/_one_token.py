"""One token of each of a few sequences through the layers of a stack, as programs.

It is what the layers' own lines compute. (Mamba's Δ is not rounded to bfloat16 between its product and its bias, and
Mamba-2's comes from our elementary functions, not from torch's; on GPUs nothing is rounded between a norm and the
product that it is part of.) Programs are kept as long as nothing that they were made from has changed, and not used
where anybody looks on: gradients, hooks, adapters, traces. A layer that is no program runs between them.

On the CPU all of them are one call of compiled kernels. On a GPU they are launches, in a captured step alone: started
one by one they would take no less time than the layers' own lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .._shapes import Tensor
from ..mixers._step import Place, Step, Watch
from ..ops import _program_cpu, _triton
from ..ops._program import ROWS, TYPES, Unfit
from ..ops._program_triton import Launches
from ..ops._register import unobserved
from ..timeline import Timeline

_ASKED: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.size,
    Tensor.is_contiguous,
    attrgetter("dtype"),
    attrgetter("is_cpu"),
)

LARGE = 1 << 17  # bytes of a layer's weights, from which on more than one thread reads them


class _Layer(NamedTuple):
    """A layer as a program, and how many tensors its state has."""

    program: Any
    states: int


class Programs:
    """The layers of a stack for inputs of one shape and type; None in place of those that are no programs.

    Args:
        stack: The stack.
        residual: Such an input.
        captured: Whether they are launches for a step whose states change in place.

    Attributes:
        normed: The type of what the stack returns, if its last norm is in the last layer's program.
    """

    def __init__(self, stack: nn.Module, residual: Tensor, captured: bool = False) -> None:
        self.shape, self.dtype, self.threads = residual.shape, residual.dtype, torch.get_num_threads()
        self.captured, self.watch = captured, Watch(residual.device)
        self.normed: torch.dtype | None = None
        self.watch.see(stack._modules, "layers")
        blocks: Any = stack._modules["layers"]
        self.count = len(blocks)
        self.layers: list[_Layer | None] = []
        self.asked: list[list[Any]] = [[] for _ in _ASKED]  # of the states, of which none is kept
        for i in range(self.count):
            step = Step(self.shape[0], self.watch)
            try:
                source, result, initial = self._layer(step, blocks, str(i))
                if captured:
                    program: Any = Launches(step, source)
                else:
                    if i == self.count - 1:
                        self._norm(step, stack, result)
                    program = _program_cpu.compiled(step)
            except Unfit:
                self.layers.append(None)
                continue
            self.layers.append(_Layer(program, len(initial)))
            for known, answers in zip(self.asked, _ask(initial), strict=True):
                known += answers
        self.watch.remember()
        # Of a small model one thread is done before a team has met at the end of each kernel.
        self.team = self.threads if self.watch.nbytes() >= LARGE * self.count else 1

    def _layer(self, step: Step, blocks: nn.Module, name: str) -> tuple[Place, Place, tuple[Tensor, ...]]:
        """Add a layer; return where the residual stream comes from and goes to, and the initial state."""
        block: Any = self.watch.module(blocks, name)
        mixer: Any = self.watch.module(block, "mixer")
        if "is_sum" not in vars(type(block)):
            raise Unfit
        if "_write_token" not in vars(type(mixer)) or self.watch.see(block._modules, "mlp") is not None:
            raise Unfit
        states = mixer.initial_state(self.shape[0])
        source, result = (step.given(self.shape[-1], self.dtype) for _ in range(2))
        y = mixer._write_token(step, step.norm(block, "norm", source), *(step.carried(x.dtype) for x in states))
        if torch.promote_types(self.dtype, y.dtype) is not self.dtype:
            raise Unfit
        step.add(source, y, self.watch.see(vars(block), "residual_multiplier"), result)
        return source, result, states

    def _norm(self, step: Step, stack: nn.Module, x: Place) -> None:
        try:
            self.normed = step.norm(stack, "norm_f", x, last=True).dtype
        except Unfit:
            self.normed = None

    def hold(self, stack: Any, residual: Tensor) -> bool:
        """Return whether these are the programs for such inputs, and of what the stack is now."""
        if residual.shape != self.shape or residual.dtype is not self.dtype or len(stack.layers) != self.count:
            return False
        return self.threads == torch.get_num_threads() and self.watch.holds()

    def run(self, stack: Any, residual: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]] | None:
        """Return what the stack returns; None if the states are not those that the programs read."""
        if not all(isinstance(state, tuple) for state in states):
            return None
        before = [x for layer, state in zip(self.layers, states, strict=True) if layer is not None for x in state]
        if not unobserved(*before) or _ask(before) != self.asked:
            return None
        if self.captured:
            return self._launch(stack, residual, states)
        after = list(map(torch.empty_like, before))
        addresses = list(zip(map(Tensor.data_ptr, before), map(Tensor.data_ptr, after), strict=True))
        arguments: list[Any] = []
        done: list[Any] = []
        place, fits = 0, True
        for layer, block, state in zip(self.layers, stack.layers, states, strict=True):
            end = place + (0 if layer is None else layer.states)
            if layer is None or not fits:
                _program_cpu.run(self.team, *arguments)
                residual, state = block(residual, state, None)
                # It may give what no program reads, if somebody looks at its calls.
                alike = residual.shape == self.shape and residual.dtype is self.dtype
                fits = alike and residual.is_cpu and unobserved(residual)
                arguments, place = [], end
                done.append(state)
                continue
            if not arguments:
                residual = residual.contiguous()
                source, residual = residual, torch.empty_like(residual)
                arguments = [layer.program, source.data_ptr(), residual.data_ptr()]
            else:
                arguments += (layer.program, residual.data_ptr(), residual.data_ptr())
            for pair in addresses[place:end]:
                arguments += pair
            done.append(type(state)(*after[place:end]))
            place = end
        if self.normed is not None and arguments:
            normed = torch.empty_like(residual, dtype=self.normed)
            _program_cpu.run(self.team, *arguments, normed.data_ptr())
            return normed, tuple(done)
        _program_cpu.run(self.team, *arguments)
        return stack.norm_f(residual), tuple(done)

    def _launch(self, stack: Any, residual: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Return what the stack returns, with the new states of the programs where the old ones are."""
        done = []
        for layer, block, state in zip(self.layers, stack.layers, states, strict=True):
            after = state
            if layer is None or residual.shape != self.shape or residual.dtype is not self.dtype:
                residual, after = block(residual, state, None)
            else:
                residual = layer.program.run(residual, state)
            done.append(after)
        return stack.norm_f(residual), tuple(done)


def _ask(states: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(ask, states)) for ask in _ASKED]


_KEPT: WeakKeyDictionary[nn.Module, dict[tuple[int, bool], Programs]] = WeakKeyDictionary()


def one_token(
    stack: nn.Module, residual: Tensor, states: tuple[Any, ...] | None, timeline: Timeline | None
) -> tuple[Tensor, tuple[Any, ...]] | None:
    """Return the normed residual stream and the states after one token; None if the stack's own lines are to be run."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or timeline is not None or states is None:
        return None
    if residual.shape[1] != 1 or not len(residual) or residual.dtype not in TYPES:
        return None
    captured = _triton.captured(residual)
    if not (captured or (residual.is_cpu and len(residual) <= ROWS and _program_cpu.there())):
        return None
    if not unobserved(residual) or torch.is_autocast_enabled(residual.device.type):
        return None
    kept, key = _KEPT.setdefault(stack, {}), (len(residual), captured)
    found = kept.get(key)
    if found is None or not found.hold(stack, residual):
        found = kept[key] = Programs(stack, residual, captured)
    return found.run(stack, residual, states) if any(found.layers) else None
