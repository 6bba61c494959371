"""Linear attention with any kind of decay."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Float, Tensor
from ...timeline import Timeline, zero_where_invalid
from .. import _triton
from .._register import at_least_float32, call, choose, define, differentiated, expect, register, with_kernel
from . import _fused, chunked, cpu, reference


def linear_attention(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h p"],
    log_decay: Float[Tensor, "..."] | None = None,
    initial: Float[Tensor, "b h k p"] | None = None,
    *,
    dt: Float[Tensor, "b t h"] | None = None,
    D: Float[Tensor, "..."] | None = None,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h k p"]]:
    """Run linear attention with decay.

        S_t = diag(e^{g_t}) S_{t−1} + k_t (Δ_t v_t)ᵀ,    y_t = S_tᵀ q_t + D ∘ v_t

    Args:
        q: Queries. With g < h groups, head i uses the queries and keys of group ⌊i / (h/g)⌋.
        k: Keys.
        v: Values.
        log_decay: g, at most 0 and finite: ``None`` (no decay), ``[h]`` (per head), ``[b t h]`` (per step and head) or
            ``[b t h k]`` (per step, head and key channel).
        initial: S_0; zero when absent.
        dt: Δ, what values are written with (Mamba-2's step, the input gate of an mLSTM); 1 when absent.
        D: Skip, ``[h]`` or ``[h p]``; none when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs in the type of ``v``, and the final state in float32 at least. Nothing is scaled or normalised.

    Raises:
        ValueError: If shapes do not go together or the backend does not exist.

    Source:
        Katharopoulos et al., arXiv:2006.16236; Yang et al., arXiv:2312.06635 (gates, chunks); Dao and Gu,
        arXiv:2405.21060 (q = C, k = B, v = x, g = ΔA).
    """
    (batch, length, groups, width), (heads, values) = q.shape, v.shape[2:]
    expect("linear_attention", "k", k, (batch, length, groups, width))
    expect("linear_attention", "v", v, (batch, length, heads, values))
    if heads % groups:
        raise ValueError(
            f"linear_attention: {heads} heads of v cannot share {groups} groups of q and k. Take a divisor of {heads}."
        )
    steps = (batch, length, heads)
    if log_decay is not None:
        expect("linear_attention", "log_decay", log_decay, steps, (heads,), (*steps, width))
    if initial is not None:
        expect("linear_attention", "initial", initial, (batch, heads, width, values))
    if dt is not None:
        expect("linear_attention", "dt", dt, steps)
    if D is not None:
        expect("linear_attention", "D", D, (heads,), (heads, values))
    if start is not None or valid is not None:
        _, start, valid = Timeline(start=start, valid=valid).expand(batch, length)
    if valid is not None:
        q, k, v = (zero_where_invalid(x, valid) for x in (q, k, v))
        dt = None if dt is None else zero_where_invalid(dt, valid)
        if log_decay is not None:
            log_decay = zero_where_invalid(log_decay.expand(steps) if log_decay.ndim == 1 else log_decay, valid)
    given = (q, k, v, log_decay, initial, dt, D)
    refusals = {"cpu": cpu.refusal(*given), "triton": _triton.refusal(*given, keys=width)}
    backend = choose("linear_attention", backend, refusals)
    if backend in _fused.KEEP:
        narrow = _fused.narrow(backend, q, k, v, log_decay)
        keep = (_fused.NARROW if narrow else _fused.KEEP[backend]) if differentiated(*given) else 0
        y, final, _ = call("written_linear_attention", *given, start, False, keep, narrow, backend=backend)
        return y, final
    y, final = _composed(*given, start, backend)
    return y.to(v.dtype), final


def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    dt: Tensor | None,
    D: Tensor | None,
    start: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute what stands before and after the recurrence by operations of torch's."""
    dtype = at_least_float32(*(x for x in (q, k, v, log_decay, initial, dt, D) if x is not None))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    written = v if dt is None else v * dt.to(dtype)[..., None]
    if initial is None:
        initial = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    arguments = (q, k, written, None if log_decay is None else log_decay.to(dtype), initial.to(dtype), start)
    if backend == "reference":
        y, final = reference.linear_attention(*arguments)
    else:
        keep = differentiated(*arguments)
        y, final, _ = call("linear_attention", *arguments, keep, backend=backend)
    if D is not None:
        y = torch.addcmul(y, v, D.to(dtype).view(v.shape[2], -1))
    return y, final


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
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor, start: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    spans = (v.shape[1] + chunked.SPAN - 1) // chunked.SPAN
    # One more than spans: tracing makes a promise about an axis that could have one entry.
    kept = initial.new_empty(spans + 1, *initial.shape) if keep else initial.new_empty(0)
    return torch.empty_like(v), torch.empty_like(initial), kept


def _fake_backward(
    grad: Tensor, grad_final: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    decay = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), decay, torch.empty_like(grad_final)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, _, start, _, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, log_decay, start, output[0], output[2])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    op = torch.ops.longstate.linear_attention_backward
    *gradients, decay, initial = op(grad.contiguous(), grad_final, *saved, ctx.backend)
    return (*gradients, None if saved[3] is None else decay, initial, None, None, None)


register(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor initial, Tensor? start, bool keep"
    " -> (Tensor, Tensor, Tensor)",
    forward={"chunked": chunked.linear_attention},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "linear_attention_backward",
    "Tensor grad, Tensor grad_final, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? start, Tensor y,"
    " Tensor beginnings -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"chunked": chunked.linear_attention_backward},
    _fake_backward,
)

_fused.register_kernel(
    with_kernel(cpu.linear_attention, triton="linear_attention.linear_attention"),
    with_kernel(cpu.linear_attention_backward, triton="linear_attention.linear_attention_backward"),
)
