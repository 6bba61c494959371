"""Systems of a diagonal minus a low rank with a step Δ of their own at every input."""

from __future__ import annotations

from typing import Any

import torch

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
    without_autocast,
)
from . import chunked, reference


def dplr_scan(
    u: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    poles: Inexact[Tensor, "d n"],
    P: Inexact[Tensor, "d n r"],
    Q: Inexact[Tensor, "d n r"],
    B: Inexact[Tensor, "d n"],
    C: Inexact[Tensor, "d n"],
    initial: Inexact[Tensor, "b d n"] | None = None,
    *,
    alpha: float = 0.5,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Inexact[Tensor, "b d n"]]:
    """Run systems x′ = A x + B u with A = diag(Λ) − P Q*, sampled by the generalised bilinear rule with any steps.

        (I − αΔ_t A) x_t = (I + (1−α)Δ_t A) x_{t−1} + Δ_t B u_t,    y_t = C · x_t

    Steps run one after the other, each for all sequences and channels at once, by Woodbury's identity: a step of a
    channel costs O(n r²) and a solution of r × r. Complex modes are one of each conjugate pair: Q* x and C · x stand
    for twice the real part. Any real matrix is Λ = 0, P = I, Q = −Aᵀ.

    Args:
        u: Inputs.
        dt: Δ, at least 0.
        poles: Λ, real or complex; so are P, Q, B, C and the state.
        P: The low rank.
        Q: Its other side.
        B: Input vectors.
        C: Output vectors.
        initial: x_0; zero when absent.
        alpha: How much of a step is taken implicitly; ½ is the bilinear rule.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs in the type of ``u``, and the final state in float32 or complex64 at least.

    Raises:
        ValueError: If shapes do not go together or the backend does not exist.

    Source:
        Gu et al., arXiv:2111.00396, section 3.2 and appendix C.2.
    """
    batch, length, width = u.shape
    states, rank = poles.shape[-1], P.shape[-1]
    expect("dplr_scan", "dt", dt, (batch, length, width))
    for name, x in (("poles", poles), ("B", B), ("C", C)):
        expect("dplr_scan", name, x, (width, states))
    for name, x in (("P", P), ("Q", Q)):
        expect("dplr_scan", name, x, (width, states, rank))
    if initial is not None:
        expect("dplr_scan", "initial", initial, (batch, width, states))
    if start is not None or valid is not None:
        _, start, valid = Timeline(None, start, valid).expand(batch, length)
    backend = choose("dplr_scan", backend)
    system = (poles, P, Q, B, C)
    dtype = at_least_float32(*(x for x in (u, *system, initial) if x is not None))
    x_0 = torch.zeros(batch, width, states, dtype=dtype, device=u.device) if initial is None else initial.to(dtype)
    # A step of no length is one that does not count.
    sequence = (zero_where_invalid(x, valid).to(real_of(dtype)) for x in (u, dt))
    given: Any = (*sequence, *(x.to(dtype) for x in system), x_0, start, alpha)
    with without_autocast(u):
        if backend == "reference":
            y, final = reference.dplr_scan(*given)
        else:
            y, final, _ = call("dplr_scan", *given, differentiated(u, dt, *system, initial), backend=backend)
    return zero_where_invalid(y, valid).to(u.dtype), final


def _fake(u: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    initial, keep = others[6], others[9]
    batch, width, states = initial.shape
    spans = (u.shape[1] + chunked.SPAN - 1) // chunked.SPAN
    kept = initial.new_empty(spans + 1, width, batch, states) if keep else initial.new_empty(0)
    return torch.empty_like(u), torch.empty_like(initial), kept


def _fake_backward(grad: Tensor, grad_final: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return (*(torch.empty_like(x) for x in others[:7]), torch.empty_like(grad_final))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, start, ctx.alpha, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, start, output[2])


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.longstate.dplr_scan_backward
    with without_autocast(grad):
        gradients = op(grad, grad_final, *ctx.saved_tensors, ctx.alpha, ctx.backend)
    return (*gradients, None, None, None, None)


_SYSTEM = "Tensor u, Tensor dt, Tensor poles, Tensor P, Tensor Q, Tensor B, Tensor C"
register(
    "dplr_scan",
    f"{_SYSTEM}, Tensor initial, Tensor? start, float alpha, bool keep -> (Tensor, Tensor, Tensor)",
    forward={"chunked": chunked.dplr_scan},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "dplr_scan_backward",
    f"Tensor grad, Tensor grad_final, {_SYSTEM}, Tensor? start, Tensor kept, float alpha"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"chunked": chunked.dplr_scan_backward},
    _fake_backward,
)
