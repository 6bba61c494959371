"""The compiled kernels: tables of a few powers, and products of small matrices."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor


def vandermonde(weights: Tensor, log_base: Tensor, length: int) -> Tensor:
    """Return what ``chunked.vandermonde`` returns."""
    assert native.kernels is not None
    kernel = native.empty((*weights.shape[:-1], length), weights.real.dtype)
    _alive, given = _given(weights, log_base, kernel)
    native.kernels.vandermonde(*given)
    return kernel


def vandermonde_backward(grad: Tensor, weights: Tensor, log_base: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``chunked.vandermonde_backward`` returns."""
    assert native.kernels is not None
    grad = grad.contiguous()
    _alive, given = _given(weights, log_base, grad)
    grad_weights, grad_log_base = (torch.empty(log_base.shape, dtype=log_base.dtype) for _ in range(2))
    native.kernels.vandermonde_backward(*given, grad_weights.data_ptr(), grad_log_base.data_ptr())
    return grad_weights.to(weights.dtype), grad_log_base


def _given(weights: Tensor, log_base: Tensor, kernel: Tensor) -> tuple[list[Tensor], list[int]]:
    """Return the tensors that must stay alive, and what the kernels begin with."""
    *rows, states = weights.shape
    alive = [x.to(log_base.dtype).resolve_conj().contiguous() for x in (weights, log_base)]
    sizes = [torch.Size(rows).numel(), states, kernel.shape[-1], weights.is_complex(), kernel.dtype == torch.float32]
    return alive, [*sizes, native.threads(), *map(native.address, alive), kernel.data_ptr()]
