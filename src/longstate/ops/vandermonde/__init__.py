"""Vandermonde products: the kernels of diagonal systems."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Float, Inexact, Tensor
from .. import _triton
from .._register import at_least_float32, call, choose, define, real_of, register, with_kernel
from . import chunked, cpu, reference


def vandermonde(
    weights: Inexact[Tensor, "... n"], log_base: Inexact[Tensor, "... n"], length: int, *, backend: str | None = None
) -> Float[Tensor, "... l"]:
    """Multiply by a Vandermonde matrix: the first taps of the kernel of a diagonal linear system.

        K_l = 2 Re Σ_n w_n e^{l z_n},    l = 0 … length − 1

    Complex numbers are one of each conjugate pair; of real ones K_l is the sum itself. With w = C B̄ and z = log Ā this
    is the kernel of S4D. Powers and sums are formed in double precision, whatever the arguments: a phase of thousands
    of radians has few digits left in float32. For that, ``log_base`` should come in double precision as well.

    Args:
        weights: w, real or complex.
        log_base: z, the logarithms of the bases; leading axes broadcast against those of the weights.
        length: The number of taps.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        K ``[… l]``, real, in the precision of ``weights`` (float32 at least).

    Raises:
        ValueError: If shapes do not go together, or the backend is not available.

    Source:
        Gu et al., arXiv:2206.11893, equation 8 and section 3.3.
    """
    if weights.ndim < 1 or log_base.ndim < 1 or weights.shape[-1] != log_base.shape[-1]:
        raise ValueError(
            f"vandermonde: weights {list(weights.shape)} and log_base {list(log_base.shape)} must end in the same"
            " number of states"
        )
    if length < 0:
        raise ValueError(f"vandermonde(length={length}): there are at least 0 taps")
    try:
        weights, log_base = torch.broadcast_tensors(weights, log_base)
    except RuntimeError as error:
        shapes = f"weights {list(weights.shape)} and log_base {list(log_base.shape)}"
        raise ValueError(f"vandermonde: the axes before the last of {shapes} do not broadcast") from error
    dtype = at_least_float32(weights)
    if log_base.is_complex():
        dtype = torch.promote_types(dtype, torch.complex32)
    log_base = log_base.to(torch.complex128 if dtype.is_complex else torch.float64)
    weights = weights.to(dtype)
    refusals = {
        "cpu": "" if weights.is_cpu else "its kernel computes on the CPU",
        "triton": _triton.refusal(weights.real if weights.is_complex() else weights),
    }
    backend = choose("vandermonde", backend, refusals)
    if backend == "reference":
        return reference.vandermonde(weights, log_base, length).to(real_of(dtype))
    return call("vandermonde", weights, log_base, length, backend=backend)


def _fake(weights: Tensor, log_base: Tensor, length: int) -> Tensor:
    return weights.new_empty((*weights.shape[:-1], length), dtype=real_of(weights.dtype))


def _fake_backward(grad: Tensor, weights: Tensor, log_base: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(log_base)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, log_base, _, ctx.backend = inputs
    ctx.save_for_backward(weights, log_base)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # these gradients are to be differentiated: a kernel's could not be
        return (*chunked.vandermonde_backward(grad, *ctx.saved_tensors), None, None)
    return (*torch.ops.longstate.vandermonde_backward(grad, *ctx.saved_tensors, ctx.backend), None, None)


register(
    "vandermonde",
    "Tensor weights, Tensor log_base, SymInt length -> Tensor",
    forward=with_kernel(cpu.vandermonde, chunked.vandermonde, "vandermonde.vandermonde"),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "vandermonde_backward",
    "Tensor grad, Tensor weights, Tensor log_base -> (Tensor, Tensor)",
    with_kernel(cpu.vandermonde_backward, chunked.vandermonde_backward, "vandermonde.vandermonde_backward"),
    _fake_backward,
)
