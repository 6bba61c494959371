"""What one more token costs a language model: operations, and bytes moved."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import state as states
from ..mixers._parts import ShortConvolution
from ..mixers.rglru import RGLRUState
from ..models import LanguageModel
from ..models.experts import Experts

# Operations for each number of a recurrent state, real or complex, which no counter of matrix products sees:
# decay (1 or 6), input (1 or 2), their sum (1 or 2), and its part of the output (2 or 4).
_RECURRENCE = {False: 5, True: 14}


class Cost(NamedTuple):
    """What a part of a model holds, and what it does for one token of one sequence.

    Attributes:
        name: The part.
        parameters: Numbers that are learned; tied ones count once.
        state_bytes: Size of the state.
        flops: Floating-point operations: matrix products, attention, recurrences and short convolutions. What acts on
            single channels (norms, gates, activations) is not counted.
        bytes_moved: Parameters and state read, and state written; of experts only as many as a step goes through.
    """

    name: str
    parameters: int
    state_bytes: int
    flops: int
    bytes_moved: int


@torch.no_grad()
def token_cost(model: LanguageModel, context: int = 1024) -> list[Cost]:
    """Return the cost of one token after ``context`` others, for the embedding, each layer, and the head.

    The model runs that far, so that windows and caches have the size they have then.
    """
    device = next(model.parameters()).device
    tokens = torch.zeros(1, context + 1, dtype=torch.int64, device=device)
    _, before = model.backbone(tokens[:, :-1])
    # The plain form of attention is made of matrix products, which are counted; the fused ones are not on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens[:, -1:], before)
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    embedding = model.get_submodule("backbone.embedding")
    table = list(embedding.parameters())  # of int8 rows, their scales as well
    costs = [Cost("embedding", _numel(embedding), 0, 0, _nbytes(embedding) // len(table[0]))]
    for i, (block, state) in enumerate(zip(model.backbone.layers, before, strict=True)):
        size = states.nbytes(state)
        flops = counts.get(f"backbone.layers.{i}", 0) + _recurrence(state) + _convolution(block)
        name = f"{i} {type(block.mlp if block.mixer is None else block.mixer).__name__}"
        costs.append(Cost(name, _numel(block), size, flops, _nbytes(block) + 2 * size))
    head = model.lm_head
    own = 0 if next(head.parameters()) is table[0] else _numel(head)
    norm = model.backbone.norm_f
    costs.append(Cost("head", own + _numel(norm), 0, counts.get("lm_head", 0), _nbytes(head) + _nbytes(norm)))
    return costs


def _recurrence(state: Any) -> int:
    if isinstance(state, RGLRUState):
        return 2 * state.h.numel()  # decay, and the sum with the input; it is its own output
    h = getattr(state, "ssm", None)
    return 0 if h is None else h.numel() * _RECURRENCE[h.is_complex()]


def _convolution(block: nn.Module) -> int:
    # A product and a sum for each tap.
    return 2 * sum(m.weight.numel() for m in block.modules() if isinstance(m, ShortConvolution))


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _nbytes(module: nn.Module) -> int:
    """Return the size of the parameters that one step needs."""
    idle = sum(
        (weight.numel() - weight.numel() // len(weight) * m.top_k) * weight.element_size()
        for m in module.modules()
        if isinstance(m, Experts)
        for weight in m.parameters(recurse=False)
    )
    return sum(p.numel() * p.element_size() for p in module.parameters()) - idle
