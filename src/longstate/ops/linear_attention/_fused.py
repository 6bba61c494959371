"""The op of the kernels, whatever they are compiled for: Δ, decay, skip and the delta rule in one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..._shapes import Tensor
from .. import _triton
from .._register import define, register
from . import cpu

Implementations = dict[str, Callable[..., Any]]

# Steps between the states that the kernels keep for the backward pass.
KEEP = {"cpu": cpu.TILE, "triton": 32 if _triton.interpreted else 512}
# Those kept in bfloat16 are what its kernel begins with, not what it walks from: four times as many.
NARROW = 32 if _triton.interpreted else 128


def narrow(backend: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> bool:
    """Return whether a backend keeps states in bfloat16."""
    by_channel = log_decay is not None and log_decay.ndim == 4
    return backend == "triton" and not by_channel and {x.dtype for x in (q, k, v)} == {torch.bfloat16}


def register_kernel(forward: Implementations, backward: Implementations) -> None:
    """Register the op of kernels, which compute ``linear_attention`` with Δ and D, and the delta rule."""
    tensors, around = "Tensor q, Tensor k, Tensor v, Tensor? log_decay", "Tensor? dt, Tensor? D, Tensor? start"
    register(
        "written_linear_attention",
        f"{tensors}, Tensor? initial, {around}, bool erases, int keep, bool narrow -> (Tensor, Tensor, Tensor)",
        forward=forward,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        computes="linear_attention",
    )
    define(
        "written_linear_attention_backward",
        f"Tensor grad, Tensor? grad_final, {tensors}, {around}, Tensor kept, bool erases, int keep"
        f" -> ({', '.join(['Tensor'] * 7)})",
        backward,
        _fake_backward,
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    final = v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    *_, keep, narrow = rest
    if not keep:
        return torch.empty_like(v), final, final.new_empty(0)
    # One more than tiles: tracing makes a promise about an axis that could have one entry.
    return (
        torch.empty_like(v),
        final,
        final.new_empty(
            (v.shape[1] + keep - 1) // keep + 1, *final.shape, dtype=torch.bfloat16 if narrow else torch.float32
        ),
    )


def _fake_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    dt: Tensor | None,
    D: Tensor | None,
    start: Tensor | None,
    kept: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    wanted = (q, k, v, log_decay, kept[0].float(), dt, D)
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x) for x in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.erases, ctx.keep, _, ctx.backend = inputs
    ctx.initial = tensors.pop(4) is not None
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # for the states that are kept, zeros would be memory touched for nothing


def _backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    if grad is None:
        grad = torch.zeros_like(saved[2])
    op = torch.ops.longstate.written_linear_attention_backward
    gradients = op(grad, grad_final, *saved, ctx.erases, ctx.keep, ctx.backend)
    _, _, _, log_decay, dt, D, *_ = saved
    there = (True, True, True, log_decay is not None, ctx.initial, dt is not None, D is not None)
    return *(x if given else None for x, given in zip(gradients, there, strict=True)), *[None] * 5
