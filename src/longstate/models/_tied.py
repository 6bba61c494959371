"""Embedding and head of one weight: their gradients meet, and no second matrix is made for the rows of a few tokens.

An embedding's gradient has the size of its weight, and is zero but for the rows of the tokens that were read. Beside a
head of the same weight, whose gradient is full, making it and adding the two takes three passes over new memory. So
the embedding, called inside ``gradients_meet``, hands its weight on as a second result of its own node; the head
multiplies with that, its gradient comes by that node, and the rows are added to it there. Whatever the two do not see
as plainly shared (adapters, compiled graphs, transformed functions) takes the way of ``torch.nn``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .._shapes import Float, Int, Tensor
from ..mixers._parts import Linear
from ..ops import linear
from ..ops._register import unobserved


class _HandedOn(NamedTuple):
    """A weight, and the same numbers as a result of the embedding's node."""

    weight: Tensor
    again: Tensor


# None outside; inside, what the last embedding handed on, if any did.
_MEETING: ContextVar[list[_HandedOn] | None] = ContextVar("meeting", default=None)


@contextmanager
def gradients_meet() -> Iterator[None]:
    """Let an embedding called inside hand its weight on to a head called after it."""
    if torch.compiler.is_compiling():
        yield
        return
    before = _MEETING.set([])
    try:
        yield
    finally:
        _MEETING.reset(before)


class Embedding(nn.Embedding):
    """``torch.nn.Embedding``, which hands its weight on to a head of the same one."""

    def forward(self, input: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Return the rows of tokens."""
        if torch.compiler.is_compiling() or (meeting := _MEETING.get()) is None or not self._may_hand_on():
            return super().forward(input)
        rows, again = _EmbeddingAndWeight.apply(input, self.weight)
        meeting[:] = [_HandedOn(self.weight, again)]
        return rows

    def _may_hand_on(self) -> bool:
        """Return whether a gradient is wanted, nobody looks on, and no option makes it another one."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad and type(self.weight) is nn.Parameter):
            return False
        options = self.padding_idx, self.max_norm, self.scale_grad_by_freq or None, self.sparse or None
        return unobserved() and options == (None,) * 4


class Head(Linear):
    """``Linear``, which takes its weight from the embedding's hands if it is the embedding's."""

    is_product = True  # as in ``Linear``

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """Return the product with the weight, and the bias."""
        return linear(input, _handed_on(self.weight), self.bias)


def _handed_on(weight: Tensor) -> Tensor:
    """Return the same weight as the embedding handed it on, if it did, and it is where it was then."""
    if torch.compiler.is_compiling() or not (meeting := _MEETING.get()):
        return weight
    (found,) = meeting
    here = found.weight is weight and found.again.data_ptr() == weight.data_ptr()
    return found.again if here and found.again.shape == weight.shape else weight


class _EmbeddingAndWeight(torch.autograd.Function):
    """Rows of a weight, and the weight again."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        ctx.vocabulary = len(weight)
        ctx.set_materialize_grads(False)
        return functional.embedding(tokens, weight), weight.detach()

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, grad: Tensor | None) -> tuple[None, Tensor | None]:
        (tokens,) = ctx.saved_tensors
        if grad_rows is None:
            return None, grad
        if grad is None or not _plain(grad, grad_rows):
            dense = torch.ops.aten.embedding_dense_backward(grad_rows, tokens, ctx.vocabulary, -1, False)
            return None, dense if grad is None else grad + dense
        # In place: the head's product has just made this gradient, for nobody else.
        return None, grad.index_add_(0, tokens.flatten(), grad_rows.flatten(0, -2))


def _plain(*grads: Tensor) -> bool:
    """Return whether gradients are numbers in memory: not to be differentiated again, nor many in the guise of one."""
    batched = any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    return not batched and unobserved(*grads) and all(grad.is_contiguous() for grad in grads)
