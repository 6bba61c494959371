"""The diagonal recurrence with a state for each channel and coefficients chosen by the input."""

from __future__ import annotations

from typing import Any

import torch

from ..._errors import check_choice
from ..._shapes import Bool, Float, Inexact, Tensor
from ...timeline import Timeline, zero_where_invalid
from .._register import at_least_float32, call, choose, define, differentiated, expect, real_of, register, with_kernel
from . import chunked, cpu, reference
from .discretization import RULES, coefficients


def selective_scan(
    u: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Inexact[Tensor, "d n"],
    B: Inexact[Tensor, "..."],
    C: Inexact[Tensor, "..."],
    D: Float[Tensor, " d"] | None = None,
    initial: Inexact[Tensor, "b d n"] | None = None,
    *,
    discretization: str = "zoh-euler",
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Inexact[Tensor, "b d n"]]:
    """Run a diagonal state space model whose step, input and output coefficients may depend on time.

        h_t = decay(Δ_t A) ∘ h_{t−1} + φ(Δ_t A) ∘ B_t Δ_t u_t,    y_t = C_tᵀ h_t + D ∘ u_t

    With complex A only one of each conjugate pair is kept, and y_t = 2 Re(C_tᵀ h_t) + D ∘ u_t.

    Args:
        u: Inputs.
        dt: Δ, the elapsed time of each step and channel, in the unit of 1/A.
        A: The diagonal of the continuous system, real or complex, Re A ≤ 0 for stability.
        B: Input coefficients ``[b t n]`` or fixed ``[d n]``.
        C: Output coefficients ``[b t n]`` or fixed ``[d n]``.
        D: Skip.
        initial: h_0; zero when absent.
        discretization: "zoh-euler" (decay e^z, φ = 1), "zoh" (e^z, (e^z − 1)/z) or "bilinear" ((1 + z/2)/(1 − z/2),
            1/(1 − z/2)).
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs in the type of ``u``, and the final state in float32 (complex64) at least.

    Raises:
        ValueError: If shapes do not go together, or the rule or the backend does not exist.

    Source:
        Gu and Dao, arXiv:2312.00752, equations 1–2 and algorithm 2; Gu et al., arXiv:2206.11893 (fixed coefficients).
    """
    check_choice("selective_scan", "discretization", discretization, RULES)
    batch, length, width = u.shape
    n = A.shape[-1]
    expect("selective_scan", "dt", dt, (batch, length, width))
    expect("selective_scan", "A", A, (width, n))
    expect("selective_scan", "B", B, (batch, length, n), (width, n))
    expect("selective_scan", "C", C, (batch, length, n), (width, n))
    if D is not None:
        expect("selective_scan", "D", D, (width,))
    if initial is not None:
        expect("selective_scan", "initial", initial, (batch, width, n))
    dtype = at_least_float32(A, B, C)
    real = at_least_float32(u, dt) if initial is None else real_of(at_least_float32(u, dt, initial))
    dtype = torch.promote_types(dtype, real)
    timeline = Timeline(start=start, valid=valid).expand(batch, length)
    if timeline.valid is not None:
        u, dt = zero_where_invalid(u, timeline.valid), zero_where_invalid(dt, timeline.valid)
        # Δ = 0 keeps the state, but not from what is no number.
        B, C = (zero_where_invalid(x, timeline.valid) if x.ndim == 3 else x for x in (B, C))
    h_0 = u.new_zeros(batch, width, n, dtype=dtype) if initial is None else initial.to(dtype)
    real = real_of(dtype)
    arguments = (u.to(real), dt.to(real), A.to(dtype), B.to(dtype), C.to(dtype), h_0, timeline.start, discretization)
    refusals = {"cpu": cpu.refusal(arguments[0], arguments[2], arguments[3], arguments[4], discretization)}
    backend = choose("selective_scan", backend, refusals)
    if backend == "reference":
        y, final = reference.selective_scan(*arguments)
    else:
        keep = differentiated(*(x for x in arguments if isinstance(x, Tensor)))
        y, final, _ = call("selective_scan", *arguments, keep, backend=backend)
    if D is not None:
        y = torch.addcmul(y, D.to(real), arguments[0])
    return zero_where_invalid(y, timeline.valid).to(u.dtype), final


def selective_scan_decay(
    dt: Float[Tensor, "b t d"],
    A: Inexact[Tensor, "d n"],
    *,
    discretization: str = "zoh-euler",
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
) -> Inexact[Tensor, "b d n"]:
    """Return the factor between the initial and the final state of ``selective_scan``."""
    timeline = Timeline(start=start, valid=valid).expand(*dt.shape[:2])
    if timeline.valid is not None:
        dt = zero_where_invalid(dt, timeline.valid)
    if discretization == "bilinear":
        decay = torch.ones(dt.shape[0], *A.shape, dtype=torch.promote_types(dt.dtype, A.dtype), device=dt.device)
        for i in range(0, dt.shape[1], chunked.CHUNK):
            decay = decay * coefficients(dt[:, i : i + chunked.CHUNK, :, None] * A, discretization)[0].prod(1)
    else:
        decay = torch.exp(dt.sum(1)[..., None] * A)
    return decay if timeline.start is None else decay.masked_fill(timeline.start.any(1)[:, None, None], 0)


def _fake(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    start: Tensor | None,
    discretization: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (u.shape[1] + chunked.CHUNK - 1) // chunked.CHUNK
    # One more than chunks: tracing makes a promise about an axis that could have one entry.
    kept = initial.new_empty(chunks + 1, *initial.shape) if keep else initial.new_empty(0)
    return torch.empty_like(u), torch.empty_like(initial), kept


def _fake_backward(
    grad: Tensor, grad_final: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return (*(torch.empty_like(x) for x in (u, dt, A, B, C)), torch.empty_like(grad_final))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, start, ctx.discretization, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, start, output[2])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.longstate.selective_scan_backward(
        grad.contiguous(), grad_final, *ctx.saved_tensors, ctx.discretization, ctx.backend
    )
    return (*gradients, None, None, None, None)


register(
    "selective_scan",
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor initial, Tensor? start, str discretization,"
    " bool keep -> (Tensor, Tensor, Tensor)",
    forward=with_kernel(cpu.selective_scan, chunked.selective_scan),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "selective_scan_backward",
    "Tensor grad, Tensor grad_final, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? start,"
    " Tensor beginnings, str discretization -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    with_kernel(cpu.selective_scan_backward, chunked.selective_scan_backward),
    _fake_backward,
)
