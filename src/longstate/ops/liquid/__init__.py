"""Liquid time-constant neurons: a recurrence that is not linear."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Float, Tensor
from ...timeline import Timeline, zero_where_invalid
from .._register import at_least_float32, call, choose, define, expect, register
from . import chunked, reference


def liquid(
    u: Float[Tensor, "b t n"],
    recurrent: Float[Tensor, "n n"],
    rate: Float[Tensor, " n"],
    target: Float[Tensor, " n"],
    dt: Float[Tensor, "b t"],
    initial: Float[Tensor, "b n"] | None = None,
    *,
    steps: int = 6,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t n"], Float[Tensor, "b n"]]:
    """Run neurons whose time constants depend on inputs and states.

        h′ = −(rate + f) ∘ h + f ∘ target,    f = σ(u + recurrent h)

    Inputs are held over their step, which is cut into small steps δ of equal length, each taken semi-implicitly:

        h ← (h + δ f ∘ target) / (1 + δ (rate + f))

    It cannot be scanned: the time that a call takes is that of its steps one after the other.

    Args:
        u: What inputs add inside σ.
        recurrent: What states add there.
        rate: 1/τ, at least 0: what decays without f.
        target: Where f draws the state to.
        dt: How long each step lasts.
        initial: h_0; zero when absent.
        steps: Small steps for each step.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Every state in the type of ``u``, and the last one in float32 at least.

    Raises:
        ValueError: If shapes do not go together, there is no small step, or the backend is not available.

    Source:
        Hasani et al., arXiv:2006.04439, equation 1 and algorithm 1.
    """
    batch, length, width = u.shape
    expect("liquid", "recurrent", recurrent, (width, width))
    expect("liquid", "rate", rate, (width,))
    expect("liquid", "target", target, (width,))
    expect("liquid", "dt", dt, (batch, length))
    if initial is not None:
        expect("liquid", "initial", initial, (batch, width))
    if steps < 1:
        raise ValueError(f"liquid(steps={steps}): there is at least one small step. Try 6.")
    dtype = at_least_float32(u, recurrent, rate, target, *([] if initial is None else [initial]))
    _, start, valid = Timeline(None, start, valid).expand(batch, length)
    u, dt = zero_where_invalid(u, valid), zero_where_invalid(dt, valid)
    h_0 = u.new_zeros(batch, width, dtype=dtype) if initial is None else initial.to(dtype)
    given: tuple[Any, ...] = (*(x.to(dtype) for x in (u, recurrent, rate, target, dt)), h_0, start, valid, steps)
    backend = choose("liquid", backend)
    states = reference.liquid(*given) if backend == "reference" else call("liquid", *given, backend=backend)
    final = states[:, -1].clone() if length else h_0.clone()
    return zero_where_invalid(states, valid).to(u.dtype), final


def _fake(u: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(u)


def _fake_backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in given[:6])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.steps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *given, states = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    gradients = torch.ops.longstate.liquid_backward(grad, *given, ctx.steps, states, ctx.backend)
    return (*gradients, None, None, None, None)


_GIVEN = (
    "Tensor u, Tensor recurrent, Tensor rate, Tensor target, Tensor dt, Tensor initial, Tensor? start, Tensor? valid,"
    " int steps"
)
register(
    "liquid",
    f"{_GIVEN} -> Tensor",
    forward={"chunked": chunked.liquid},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "liquid_backward",
    f"Tensor grad, {_GIVEN}, Tensor states -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"chunked": chunked.liquid_backward},
    _fake_backward,
)
