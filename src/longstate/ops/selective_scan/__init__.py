"""The diagonal recurrence with a state for each channel and coefficients chosen by the input."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu, softplus

from ..._errors import check_choice
from ..._shapes import Bool, Float, Inexact, Tensor
from ...timeline import Timeline, zero_where_invalid
from .._register import (
    at_least_float32,
    call,
    choose,
    define,
    differentiated,
    expect,
    real_of,
    register,
    with_kernel,
)
from . import _fused, chunked, cpu, reference
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
    gate: Float[Tensor, "b t d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    dt_softplus: bool = False,
    elapsed: Float[Tensor, "b t"] | None = None,
    log_A: bool = False,
    discretization: str = "zoh-euler",
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Inexact[Tensor, "b d n"]]:
    """Run a diagonal state space model whose step, input and output coefficients may depend on time.

        Δ_t = elapsed_t · softplus(dt_t + dt_bias)
        h_t = decay(Δ_t A) ∘ h_{t−1} + φ(Δ_t A) ∘ B_t Δ_t u_t,    y_t = (C_tᵀ h_t + D ∘ u_t) ∘ SiLU(gate_t)

    With complex A only one of each conjugate pair is kept, and 2 Re(C_tᵀ h_t) stands for C_tᵀ h_t.

    Args:
        u: Inputs.
        dt: What Δ, the time of each step and channel in the unit of 1/A, is computed from.
        A: The diagonal of the continuous system, real or complex, Re A ≤ 0 for stability.
        B: Input coefficients ``[b t n]`` or fixed ``[d n]``.
        C: Output coefficients ``[b t n]`` or fixed ``[d n]``.
        D: Skip.
        initial: h_0; zero when absent.
        gate: What the output is multiplied by the SiLU of.
        dt_bias: Added to ``dt``.
        dt_softplus: Whether Δ is the softplus of that, or that itself.
        elapsed: What multiplies Δ at each step; 1 when absent.
        log_A: Whether ``A`` holds log(−A) for a real A.
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
    (batch, length, width), n = u.shape, A.shape[-1]
    expect("selective_scan", "dt", dt, (batch, length, width))
    expect("selective_scan", "A", A, (width, n))
    expect("selective_scan", "B", B, (batch, length, n), (width, n))
    expect("selective_scan", "C", C, (batch, length, n), (width, n))
    options = {"D": (D, (width,)), "initial": (initial, (batch, width, n)), "gate": (gate, (batch, length, width))}
    for name, (x, shape) in (options | {"dt_bias": (dt_bias, (width,)), "elapsed": (elapsed, (batch, length))}).items():
        if x is not None:
            expect("selective_scan", name, x, shape)
    if start is not None or valid is not None:
        _, start, valid = Timeline(start=start, valid=valid).expand(batch, length)
    if valid is not None:
        # Δ = 0 keeps the state, but not from what is no number.
        u, dt = zero_where_invalid(u, valid), zero_where_invalid(dt, valid)
        B, C = (zero_where_invalid(x, valid) if x.ndim == 3 else x for x in (B, C))
        gate = None if gate is None else zero_where_invalid(gate, valid)
        elapsed = valid.to(dt.dtype) if elapsed is None else zero_where_invalid(elapsed, valid)
    given = (u, dt, A, B, C, D, initial, gate, dt_bias, elapsed)
    backend = choose("selective_scan", backend, _fused.refusals(discretization, *given))
    if backend in _fused.KEEP:
        flags = (dt_softplus, log_A, _fused.KEEP[backend] if differentiated(*given) else 0)
        y, final, _ = call("gated_selective_scan", *given, start, *flags, backend=backend)
    else:
        y, final = _composed(*given, start, dt_softplus, log_A, discretization, backend)
    return zero_where_invalid(y, valid).to(u.dtype), final


def _composed(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    elapsed: Tensor | None,
    start: Tensor | None,
    dt_softplus: bool,
    log_A: bool,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute what stands before and after the recurrence by operations of torch's."""
    real = at_least_float32(u, dt) if initial is None else real_of(at_least_float32(u, dt, initial))
    dtype = torch.promote_types(at_least_float32(A, B, C), real)
    real = real_of(dtype)
    u, dt = u.to(real), dt.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias.to(real)
    if dt_softplus:
        dt = softplus(dt)
    if elapsed is not None:
        dt = dt * elapsed.to(real)[..., None]
    A = -A.to(real).exp() if log_A else A
    h_0 = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if initial is None else initial.to(dtype)
    arguments = (u, dt, A.to(dtype), B.to(dtype), C.to(dtype), h_0, start, discretization)
    if backend == "reference":
        y, final = reference.selective_scan(*arguments)
    else:
        keep = differentiated(*(x for x in arguments if isinstance(x, Tensor)))
        y, final, _ = call("selective_scan", *arguments, keep, backend=backend)
    if D is not None:
        y = torch.addcmul(y, D.to(real), u)
    return (y if gate is None else y * silu(gate.to(real))), final


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
    forward={"chunked": chunked.selective_scan},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "selective_scan_backward",
    "Tensor grad, Tensor grad_final, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? start,"
    " Tensor beginnings, str discretization -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"chunked": chunked.selective_scan_backward},
    _fake_backward,
)

_fused.register_kernel(
    with_kernel(cpu.selective_scan, triton="selective_scan.selective_scan"),
    with_kernel(cpu.selective_scan_backward, triton="selective_scan.selective_scan_backward"),
)
