"""The delta rule: linear attention that erases what it held at a key before it writes there."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Float, Tensor
from ...timeline import Timeline, zero_where_invalid
from .. import _triton
from .._register import (
    at_least_float32,
    call,
    choose,
    define,
    differentiated,
    expect,
    list_backends,
    register,
    with_kernel,
)
from ..linear_attention import _fused, cpu
from . import chunked, reference


def delta_rule(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h p"],
    beta: Float[Tensor, "b t h"],
    log_decay: Float[Tensor, "..."] | None = None,
    initial: Float[Tensor, "b h k p"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h k p"]]:
    """Run linear attention whose state, read at the key, moves towards the value by β.

        S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t−1} + β_t k_t v_tᵀ,    y_t = S_tᵀ q_t

    The state decays first and is erased then, which makes a difference where key channels decay apart.

    Args:
        q: Queries. With g < h groups, head i uses the queries and keys of group ⌊i / (h/g)⌋.
        k: Keys; of length 1, else the state may grow (β |k|² ≤ 2 keeps it from that).
        v: Values.
        beta: β, the write strength, from 0 to 1, or to 2 for eigenvalues down to −1.
        log_decay: g, at most 0 and finite: ``None`` (no decay), ``[b t h]`` (per step and head) or ``[b t h k]`` (per
            step, head and key channel).
        initial: S_0; zero when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs in the type of ``v``, and the final state in float32 at least. Nothing is scaled or normalised. What
        is left of the initial state in the final one is a matrix: there is no factor to ask for.

    Raises:
        ValueError: If shapes do not go together or the backend does not exist.

    Source:
        Yang et al., arXiv:2406.06484 (no decay, chunks), arXiv:2412.06464 (a decay for each head); Kimi Team,
        arXiv:2510.26692, equation 1 (for each key channel).
    """
    (batch, length, groups, width), (heads, values) = q.shape, v.shape[2:]
    steps = (batch, length, heads)
    expect("delta_rule", "k", k, (batch, length, groups, width))
    expect("delta_rule", "v", v, (*steps, values))
    expect("delta_rule", "beta", beta, steps)
    if heads % groups:
        raise ValueError(
            f"delta_rule: {heads} heads of v cannot share {groups} groups of q and k. Take a divisor of {heads}."
        )
    if log_decay is not None:
        expect("delta_rule", "log_decay", log_decay, steps, (*steps, width))
    if initial is not None:
        expect("delta_rule", "initial", initial, (batch, heads, width, values))
    if start is not None or valid is not None:
        _, start, valid = Timeline(start=start, valid=valid).expand(batch, length)
    if valid is not None:
        q, k, v, beta = (zero_where_invalid(x, valid) for x in (q, k, v, beta))
        log_decay = None if log_decay is None else zero_where_invalid(log_decay, valid)
    given = (q, k, v, log_decay, initial, beta)
    refusals = {"cpu": cpu.refusal(*given), "triton": _triton.refusal(*given, keys=width)}
    backend = choose("delta_rule", backend, refusals)
    if backend in _fused.KEEP:
        around = (None, start, True, _fused.KEEP[backend] if differentiated(*given) else 0, False)
        y, final, _ = call("written_linear_attention", *given, *around, backend=backend)
        return y, final
    dtype = at_least_float32(*(x for x in given if x is not None))
    if initial is None:
        initial = v.new_zeros(batch, heads, width, values)
    g = None if log_decay is None else log_decay.to(dtype)
    arguments = (q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype), g, initial.to(dtype), start)
    if backend == "reference":
        y, final = reference.delta_rule(*arguments)
    else:
        y, final, _ = call("delta_rule", *arguments, differentiated(*given), backend=backend)
    return y.to(v.dtype), final


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial: Tensor,
    start: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # One more than spans: tracing makes a promise about an axis that could have one entry.
    spans = (v.shape[1] + chunked.SPAN - 1) // chunked.SPAN + 1
    kept = initial.new_empty(spans, *initial.shape) if keep else initial.new_empty(0)
    return torch.empty_like(v), torch.empty_like(initial), kept


def _fake_backward(
    grad: Tensor, grad_final: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    decay = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    return (*(torch.empty_like(x) for x in (q, k, v, beta)), decay, torch.empty_like(grad_final))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, start, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, start, output[2])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    *gradients, decay, initial = torch.ops.longstate.delta_rule_backward(grad, grad_final, *saved, ctx.backend)
    return (*gradients, None if saved[4] is None else decay, initial, None, None, None)


register(
    "delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor initial, Tensor? start, bool keep"
    " -> (Tensor, Tensor, Tensor)",
    forward={"chunked": chunked.delta_rule},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "delta_rule_backward",
    "Tensor grad, Tensor grad_final, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? start,"
    " Tensor beginnings -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"chunked": chunked.delta_rule_backward},
    _fake_backward,
)
list_backends("delta_rule", with_kernel(cpu.linear_attention, chunked.delta_rule, "linear_attention.linear_attention"))
