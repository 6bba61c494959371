"""Causal depthwise convolutions, short and long, with the inputs that came before as their state."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, silu

from ..._errors import check_choice
from ..._shapes import Bool, Float, Tensor
from ...timeline import Compaction, Timeline, segments, zero_where_invalid
from .. import _triton
from .._register import at_least_float32, call, choose, define, expect, register, with_kernel
from . import _fused, chunked, cpu, reference

__all__ = ["long", "short"]


def short(
    u: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    initial: Float[Tensor, "b window d"] | None = None,
    *,
    activation: str | None = None,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b window d"]]:
    """Convolve each channel with a few taps, the last of which meets the present step.

        y_t = activation(bias + Σ_{i<k} weight_{k−1−i} ∘ u_{t−i})

    Args:
        u: Inputs.
        weight: Taps, the oldest first (the layout of ``torch.nn.Conv1d`` without its middle axis).
        bias: Added before the activation.
        initial: The last k − 1 inputs before these, the oldest first; zero when absent.
        activation: "silu" or None.
        start: Where a new sequence begins; its window does not reach behind it.
        valid: Where the step counts; windows skip other steps, and the output there is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs, and the last k − 1 inputs that counted; both in the type of ``u``.

    Raises:
        ValueError: If shapes do not go together, or the activation or the backend does not exist.
    """
    if activation is not None:
        check_choice("convolution.short", "activation", activation, ["silu"])
    _check("short_convolution", u, weight, bias, initial)
    if start is not None or valid is not None:
        _, start, valid = Timeline(None, start, valid).expand(*u.shape[:2])
    refusals = {"cpu": cpu.refusal(u, weight, bias), "triton": _triton.refusal(u, weight, bias)}
    if weight.shape[1] > _fused.MOST_TAPS and not refusals["triton"]:
        refusals["triton"] = f"its kernel takes at most {_fused.MOST_TAPS} taps"
    backend = choose("short_convolution", backend, refusals)
    if backend not in ("cpu", "triton"):
        return _convolve("short_convolution", u, weight.flip(1), bias, initial, activation, start, valid, backend)
    if initial is not None and initial.dtype != u.dtype:
        initial = initial.to(u.dtype)
    silu = activation is not None
    y, final = call("activated_short_convolution", u, weight, bias, initial, start, valid, silu, backend=backend)
    return y, final


def long(
    u: Float[Tensor, "b t d"],
    kernel: Float[Tensor, "d l"],
    initial: Float[Tensor, "b window d"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b window d"]]:
    """Convolve each channel with a long kernel, the first tap of which meets the present step.

        y_t = Σ_{i<l} kernel_i ∘ u_{t−i}

    Args:
        u: Inputs.
        kernel: Taps, the newest first.
        initial: The last l − 1 inputs before these, the oldest first; zero when absent.
        start: Where a new sequence begins; nothing before it is seen.
        valid: Where the step counts; others are skipped, and the output there is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs, and the last l − 1 inputs that counted; both in the type of ``u``.

    Raises:
        ValueError: If shapes do not go together or the backend does not exist.
    """
    _check("long_convolution", u, kernel, None, initial)
    _, start, valid = Timeline(None, start, valid).expand(*u.shape[:2])
    backend = choose("long_convolution", backend)
    return _convolve("long_convolution", u, kernel, None, initial, None, start, valid, backend)


def _check(op: str, u: Tensor, taps: Tensor, bias: Tensor | None, initial: Tensor | None) -> None:
    batch, _, width = u.shape
    k = taps.shape[-1]
    expect(op, "taps", taps, (width, k))
    if bias is not None:
        expect(op, "bias", bias, (width,))
    if initial is not None:
        expect(op, "initial", initial, (batch, k - 1, width))


def _convolve(
    op: str,
    u: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    activation: str | None,
    start: Tensor | None,
    valid: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Put the state before the inputs, bring the steps that count together, convolve, and take the new state."""
    batch, length, width = u.shape
    before = taps.shape[1] - 1
    dtype = at_least_float32(u, taps)
    compaction = None if valid is None else Compaction.of(valid)
    inputs = u
    if compaction is not None:
        inputs = compaction.compact(zero_where_invalid(u, valid))
        start = None if start is None else compaction.start(start)
    padded = pad(inputs, (0, 0, before, 0)) if initial is None else torch.cat([initial.to(u.dtype), inputs], 1)
    segment = None if start is None else pad(segments(start), (before, 0))

    if backend == "reference":
        y = reference.convolution(padded.to(dtype), taps.to(dtype), segment)
    else:
        y = call(op, padded.to(dtype), taps.to(dtype), segment, backend=backend)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = silu(y)

    if compaction is not None:
        y = compaction.restore(y)
        window = compaction.total[:, None] + torch.arange(before, device=u.device)
        final = padded.gather(1, window[..., None].expand(batch, before, width))
        alive = None if segment is None else segment.gather(1, window) == segment[:, -1:]
    else:
        final = padded[:, length:].clone()
        alive = None if segment is None else segment[:, length:] == segment[:, -1:]
    if alive is not None:
        final = final.masked_fill(~alive[..., None], 0)
    return y.to(u.dtype), final


def _fake(padded: Tensor, taps: Tensor, segment: Tensor | None) -> Tensor:
    return padded.new_empty(padded.shape[0], padded.shape[1] - taps.shape[1] + 1, padded.shape[2])


def _fake_backward(grad: Tensor, padded: Tensor, taps: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(padded), torch.empty_like(taps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _register(op: str, forward: Any, backward: Any) -> None:
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both = getattr(torch.ops.longstate, f"{op}_backward")(grad, *ctx.saved_tensors, ctx.backend)
        return (*both, None, None)

    schema = "Tensor padded, Tensor taps, Tensor? segment"
    register(
        op,
        f"{schema} -> Tensor",
        forward={"chunked": forward},
        fake=_fake,
        setup_context=_setup_context,
        backward=gradients,
    )
    define(f"{op}_backward", f"Tensor grad, {schema} -> (Tensor, Tensor)", {"chunked": backward}, _fake_backward)


_register("short_convolution", chunked.short, chunked.short_backward)
_register("long_convolution", chunked.long, chunked.long_backward)


def _by_reference(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    activation = "silu" if silu else None
    return _convolve("short_convolution", u, weight.flip(1), bias, initial, activation, start, valid, "reference")


_fused.register_kernel(
    with_kernel(cpu.short, triton="convolution.short"),
    with_kernel(cpu.short_backward, triton="convolution.short_backward"),
    _by_reference,
)
