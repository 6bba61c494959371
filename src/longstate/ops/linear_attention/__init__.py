"""Linear attention with any kind of decay."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Float, Tensor
from ...timeline import Timeline, zero_where_invalid
from .._register import at_least_float32, call, choose, define, differentiated, expect, register, with_kernel
from . import chunked, cpu, reference


def linear_attention(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h p"],
    log_decay: Float[Tensor, "..."] | None = None,
    initial: Float[Tensor, "b h k p"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h k p"]]:
    """Run linear attention with decay.

        S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ,    y_t = S_tᵀ q_t

    Args:
        q: Queries. With g < h groups, head i uses the queries and keys of group ⌊i / (h/g)⌋.
        k: Keys.
        v: Values.
        log_decay: g, at most 0 and finite: ``None`` (no decay), ``[h]`` (per head), ``[b t h]`` (per step and head) or
            ``[b t h k]`` (per step, head and key channel).
        initial: S_0; zero when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs in the type of ``v``, and the final state in float32 at least. Nothing is scaled or normalised.

    Raises:
        ValueError: If shapes do not go together or the backend does not exist.

    Source:
        Katharopoulos et al., arXiv:2006.16236; Yang et al., arXiv:2312.06635 (gates, chunks); Dao and Gu,
        arXiv:2405.21060 (q = C, k = B, v = Δx, g = ΔA).
    """
    _check(q, k, v, log_decay, initial)
    backend = choose("linear_attention", backend, {"cpu": cpu.refusal(q, k, v, log_decay, initial)})
    output, dtype = v.dtype, torch.float32
    if backend != "cpu":
        dtype = at_least_float32(*(x for x in (q, k, v, log_decay, initial) if x is not None))
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if start is not None or valid is not None:
        timeline = Timeline(start=start, valid=valid).expand(q.shape[0], q.shape[1])
        start, valid = timeline.start, timeline.valid
        q, k, v = (zero_where_invalid(x, valid) for x in (q, k, v))
        if log_decay is not None and valid is not None:
            log_decay = log_decay.expand(v.shape[:3]) if log_decay.ndim == 1 else log_decay
            log_decay = zero_where_invalid(log_decay, valid)
    if log_decay is not None and log_decay.dtype is not dtype:  # asked first: a conversion to the same is not free
        log_decay = log_decay.to(dtype)
    if initial is None:
        initial = v.new_zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
    elif initial.dtype is not dtype:
        initial = initial.to(dtype)
    if backend == "reference":
        y, final = reference.linear_attention(q, k, v, log_decay, initial, start)
    else:
        interval = cpu.TILE if backend == "cpu" else chunked.SPAN
        keep = interval if differentiated(q, k, v, log_decay, initial) else 0
        y, final, _ = call("linear_attention", q, k, v, log_decay, initial, start, keep, backend=backend)
    return (y if y.dtype is output else y.to(output)), final


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None) -> None:
    """Check that shapes go together."""
    batch, length, groups, width = q.shape
    heads, values = v.shape[2], v.shape[3]
    expect("linear_attention", "k", k, q.shape)
    expect("linear_attention", "v", v, (batch, length, heads, values))
    if heads % groups:
        raise ValueError(
            f"linear_attention: {heads} heads of v cannot share {groups} groups of q and k. Take a divisor of {heads}."
        )
    if log_decay is not None:
        shape = (batch, length, heads)
        expect("linear_attention", "log_decay", log_decay, (heads,), shape, (*shape, width))
    if initial is not None:
        expect("linear_attention", "initial", initial, (batch, heads, width, values))


def linear_attention_decay(
    log_decay: Float[Tensor, "..."],
    length: int | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "..."]:
    """Return the factor between the initial and the final state of ``linear_attention``.

    Args:
        log_decay: ``[b t h]`` or ``[b t h k]``; or ``[h]`` together with the ``length`` of the call and neither flag.
        length: The number of steps, for a decay per head.
        start: Where the state is set to zero before the step.
        valid: Where the step counts.

    Returns:
        ``[b h]``, ``[b h k]`` or ``[h]``.
    """
    if length is not None:
        if start is not None or valid is not None:
            raise ValueError(
                "linear_attention_decay(length=…): start and valid need a decay for each step. Expand it to [b t h]."
            )
        return torch.exp(log_decay * length)
    timeline = Timeline(start=start, valid=valid).expand(*log_decay.shape[:2])
    total = zero_where_invalid(log_decay, timeline.valid).sum(1).exp()
    if timeline.start is None:
        return total
    return total.masked_fill(timeline.start.any(1).view(-1, *[1] * (total.ndim - 1)), 0)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor, start: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    # One more than there are: tracing makes a promise about an axis that could have one entry.
    kept = initial.new_empty((v.shape[1] + keep - 1) // keep + 1, *initial.shape) if keep else initial.new_empty(0)
    return torch.empty_like(v), torch.empty_like(initial), kept


def _fake_backward(
    grad: Tensor, grad_final: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    decay = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), decay, torch.empty_like(grad_final)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, _, start, _, ctx.backend = inputs
    y = None if ctx.backend == "cpu" else output[0]
    ctx.save_for_backward(q, k, v, log_decay, start, y, output[2])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    op = torch.ops.longstate.linear_attention_backward
    *gradients, decay, initial = op(grad, grad_final, *saved, ctx.backend)
    return (*gradients, None if saved[3] is None else decay, initial, None, None, None)


register(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor initial, Tensor? start, int keep"
    " -> (Tensor, Tensor, Tensor)",
    forward=with_kernel(cpu.linear_attention, chunked.linear_attention),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "linear_attention_backward",
    "Tensor grad, Tensor grad_final, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? start, Tensor? y,"
    " Tensor beginnings -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    with_kernel(cpu.linear_attention_backward, chunked.linear_attention_backward),
    _fake_backward,
)
