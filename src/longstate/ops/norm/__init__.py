"""The root-mean-square norm, plain or gated."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Float, Tensor
from .. import _triton
from .._register import call, choose, define, expect, register, twice, with_kernel
from . import cpu, reference


def rms_norm(
    x: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"] | None = None,
    gate: Float[Tensor, "*b d"] | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    offset: float = 0.0,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "*b d"]:
    """Divide by the root of the mean square, optionally by groups of channels and beside a gate, in float32 at least.

        y = (offset + weight) ∘ x̂,    x̂ = x / √(mean(x²) + eps)

    With a gate, x ← x ∘ SiLU(gate) before the norm, or y ← y ∘ SiLU(gate) after it.

    Args:
        x: Inputs; the mean is over their last axis.
        weight: Factors of what was normed; 1 when absent.
        gate: Passes through SiLU and multiplies.
        eps: Added to the mean square.
        groups: Groups of channels that are normed apart.
        offset: Added to the weight.
        norm_before_gate: Whether the gate multiplies what was normed, and not what will be.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        What was normed in the type of the weight, or of ``x`` where there is none. A norm without offset and later gate
        is rounded to that type before the weight multiplies it.

    Raises:
        ValueError: If shapes do not go together, the width does not divide into groups, or the backend does not exist.

    Source:
        Zhang and Sennrich, arXiv:1910.07467; gated, arXiv:2405.21060; 1 + weight, arXiv:2402.19427.
    """
    width = x.shape[-1]
    if groups < 1 or width % groups:
        raise ValueError(f"rms_norm(groups={groups}): the width {width} is not a multiple of groups")
    if weight is not None:
        expect("rms_norm", "weight", weight, (width,))
    if gate is not None:
        expect("rms_norm", "gate", gate, x.shape)
    backend = choose(
        "rms_norm", backend, {"cpu": cpu.refusal(x, weight, gate), "triton": _triton.refusal(x, weight, gate)}
    )
    if backend == "reference":
        return reference.rms_norm(x, weight, gate, eps, groups, offset, norm_before_gate)
    y: Tensor = call("rms_norm", x, weight, gate, eps, groups, offset, norm_before_gate, backend=backend)
    return y


def _fake(x: Tensor, weight: Tensor | None, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=(x if weight is None else weight).dtype)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if y is None else torch.empty_like(y) for y in (x, weight, gate))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    rest = (None for _ in ctx.options)
    if torch.is_grad_enabled():
        return (*twice(lambda: reference.rms_norm(*given, *ctx.options[:-1]), given, (grad,)), *rest)
    gradients = torch.ops.longstate.rms_norm_backward(grad, *given, *ctx.options)
    return (*(None if x is None else g for x, g in zip(given, gradients, strict=True)), *rest)


_SCHEMA = "Tensor x, Tensor? weight, Tensor? gate, float eps, int groups, float offset, bool norm_before_gate"
register(
    "rms_norm",
    f"{_SCHEMA} -> Tensor",
    forward=with_kernel(cpu.rms_norm, triton="norm.rms_norm"),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "rms_norm_backward",
    f"Tensor grad, {_SCHEMA} -> (Tensor, Tensor, Tensor)",
    with_kernel(cpu.rms_norm_backward, triton="norm.rms_norm_backward"),
    _fake_backward,
)
