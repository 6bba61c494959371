"""The op of the kernels, whatever they are compiled for: from Δ's softplus to the gate in one node."""

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
KEEP = {"cpu": cpu.TILE, "triton": 8 if _triton.interpreted else 16}


def refusals(discretization: str, *given: Tensor | None) -> dict[str, str]:
    """Return why each backend does not take such arguments; "" if it does."""
    _, _, _, B, C, *_ = given
    unfit = ""
    if discretization != "zoh-euler" or B is None or B.ndim != 3 or C is None or C.ndim != 3:
        unfit = 'its kernel has the rule "zoh-euler", with B and C for each step'
    return {"cpu": cpu.refusal(*given) or unfit, "triton": _triton.refusal(*given) or unfit}


def register_kernel(forward: Implementations, backward: Implementations) -> None:
    """Register the op of kernels, which compute ``selective_scan`` and what stands around it."""
    tensors = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D"
    around = "Tensor? gate, Tensor? dt_bias, Tensor? elapsed, Tensor? start"
    flags = "bool dt_softplus, bool log_A"
    register(
        "gated_selective_scan",
        f"{tensors}, Tensor? initial, {around}, {flags}, int keep -> (Tensor, Tensor, Tensor)",
        forward=forward,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        computes="selective_scan",
    )
    define(
        "gated_selective_scan_backward",
        f"Tensor grad, Tensor? grad_final, {tensors}, {around}, Tensor kept, {flags}, int keep"
        f" -> ({', '.join(['Tensor'] * 10)})",
        backward,
        _fake_backward,
    )


def _fake(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    final, keep = A.new_empty(u.shape[0], *A.shape, dtype=torch.float32), rest[-1]
    if not keep:
        return torch.empty_like(u), final, final.new_empty(0)
    # One more than tiles: tracing makes a promise about an axis that could have one entry.
    return torch.empty_like(u), final, final.new_empty((u.shape[1] + keep - 1) // keep + 1, *final.shape)


def _fake_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    elapsed: Tensor | None,
    start: Tensor | None,
    kept: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    wanted = (u, dt, A, B, C, D, kept[0], gate, dt_bias, elapsed)
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.log_A, ctx.keep, ctx.backend = inputs
    ctx.initial = tensors.pop(6) is not None
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # for the states that are kept, zeros would be memory touched for nothing


def _backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(saved[0])
    gradients = torch.ops.longstate.gated_selective_scan_backward(
        grad, grad_final, *saved, ctx.dt_softplus, ctx.log_A, ctx.keep, ctx.backend
    )
    _, _, _, _, _, D, gate, dt_bias, elapsed, *_ = saved
    there = (True,) * 5 + (D is not None, ctx.initial) + tuple(x is not None for x in (gate, dt_bias, elapsed))
    return (*(x if given else None for x, given in zip(gradients, there, strict=True)), *[None] * 5)
