"""Cauchy sums: the transfer functions of diagonal systems, of which those of DPLR systems are made."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Inexact, Tensor
from .._register import at_least_float32, call, choose, define, differentiated, expect, register, with_kernel
from . import chunked, cpu, reference


def cauchy(
    weights: Inexact[Tensor, "... n"],
    nodes: Inexact[Tensor, " l"],
    poles: Inexact[Tensor, "... n"],
    *,
    backend: str | None = None,
) -> Inexact[Tensor, "... l"]:
    """Multiply by a Cauchy matrix: values of transfer functions Cᵀ(zI − A)⁻¹B with diagonal A.

        K_l = Σ_n w_n / (z_l − λ_n) + w̄_n / (z_l − λ̄_n)

    Complex weights and poles are one of each conjugate pair; with real ones K_l is the first sum alone. Quotients and
    sums are formed in double precision, whatever the arguments, from differences of nodes and poles.

    Axes of the weights before those of the poles are several sums with the same poles, which share their quotients. For
    a system A = Λ − P Q* sampled by the bilinear rule with step Δ (S4) there are four: at roots of unity ω other than
    −1, with nodes 2(1 − ω)/(1 + ω), poles ΔΛ and weights (C̃B, C̃P, Q̄B, Q̄P), the transform of the first L taps is

        K̂(ω) = 2Δ/(1 + ω) (k_CB − k_CP k_QB / (1/Δ + k_QP)),    C̃ = (I − Ā^L)ᵀ C

    and for rank r there are (1 + r)². At ω = −1 it is ΔC̃ᵀB/2.

    Args:
        weights: w ``[… d n]``, real or complex.
        nodes: z, finite and not on a pole. They have no gradient: what scales them can scale weights and poles.
        poles: λ ``[d n]``, or with any axes before the last; the last axes of the weights.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        K ``[… d l]``, complex, in the precision of ``weights`` (complex64 at least).

    Raises:
        ValueError: If shapes do not go together, nodes want a gradient, or the backend is not available.

    Source:
        Gu et al., arXiv:2111.00396, section 3.2 and appendix C.3.
    """
    expect("cauchy", "nodes", nodes, (nodes.numel(),))
    if poles.ndim < 1 or poles.ndim > weights.ndim or weights.shape[weights.ndim - poles.ndim :] != poles.shape:
        raise ValueError(
            f"cauchy: weights {list(weights.shape)} must end in the axes of poles {list(poles.shape)}; axes before"
            " those are several sums"
        )
    if differentiated(nodes):
        raise ValueError("cauchy: nodes have no gradient. Detach them, and scale weights and poles instead.")
    single = at_least_float32(weights) in (torch.float32, torch.complex64)
    pairs = weights.is_complex() or poles.is_complex()
    dtype, nodes = torch.complex128 if pairs else torch.float64, nodes.to(torch.complex128)
    weights, poles = weights.to(dtype), poles.to(dtype)
    refusal = "" if weights.device.type == "cpu" else "its kernel computes on the CPU"
    backend = choose("cauchy", backend, {"cpu": refusal})
    if backend == "reference":
        return reference.cauchy(weights, nodes, poles).to(torch.complex64 if single else torch.complex128)
    if pairs:  # as two terms of real coefficients: see chunked.py
        real, imaginary = poles.real, poles.imag
        a, b = 2 * weights.real, -2 * weights.imag * imaginary
    else:
        real, imaginary, a, b = poles, torch.zeros_like(poles), weights, torch.zeros_like(weights)
    sums, rows, states = weights.shape[: weights.ndim - poles.ndim].numel(), poles.shape[:-1].numel(), poles.shape[-1]
    a, b = (x.reshape(sums, rows, states) for x in (a, b))
    real, imaginary = (x.reshape(rows, states) for x in (real, imaginary))
    kernel = call("cauchy", a, b, real, imaginary, nodes, single, backend=backend)
    return kernel.view(*weights.shape[:-1], len(nodes))


def _fake(a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor, single: bool) -> Tensor:
    return nodes.new_empty((*a.shape[:2], len(nodes)), dtype=torch.complex64 if single else torch.complex128)


def _fake_backward(
    grad: Tensor, a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (a, b, real, imaginary))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # these gradients are to be differentiated: a kernel's could not be
        return (*chunked.cauchy_backward(grad, *ctx.saved_tensors), None, None, None)
    return (*torch.ops.longstate.cauchy_backward(grad, *ctx.saved_tensors, ctx.backend), None, None, None)


register(
    "cauchy",
    "Tensor a, Tensor b, Tensor real, Tensor imaginary, Tensor nodes, bool single -> Tensor",
    forward=with_kernel(cpu.cauchy, chunked.cauchy),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "cauchy_backward",
    "Tensor grad, Tensor a, Tensor b, Tensor real, Tensor imaginary, Tensor nodes -> (Tensor, Tensor, Tensor, Tensor)",
    with_kernel(cpu.cauchy_backward, chunked.cauchy_backward),
    _fake_backward,
)
