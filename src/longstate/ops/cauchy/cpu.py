"""The compiled kernels: every quotient is formed once for all sums that share it."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor


def cauchy(a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor, single: bool) -> Tensor:
    """Return what ``chunked.cauchy`` returns."""
    assert native.kernels is not None
    kernel = native.empty((*a.shape[:2], len(nodes)), torch.complex64 if single else torch.complex128)
    _alive, given = _given(a, b, real, imaginary, nodes, kernel)
    native.kernels.cauchy(*given)
    return kernel


def cauchy_backward(
    grad: Tensor, a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``chunked.cauchy_backward`` returns."""
    assert native.kernels is not None
    grad = grad.resolve_conj().contiguous()
    _alive, given = _given(a, b, real, imaginary, nodes, grad)
    grad_a, grad_b, grad_real, grad_imaginary = (torch.empty(x.shape, dtype=x.dtype) for x in (a, b, real, imaginary))
    native.kernels.cauchy_backward(*given, *map(native.address, (grad_a, grad_b, grad_real, grad_imaginary)))
    return grad_a, grad_b, grad_real, grad_imaginary


def _given(
    a: Tensor, b: Tensor, real: Tensor, imaginary: Tensor, nodes: Tensor, kernel: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Return the tensors that must stay alive, and what the kernels begin with."""
    alive = [x.contiguous() for x in (a, b, real, imaginary, nodes.resolve_conj())]
    sizes = [*a.shape, len(nodes), kernel.dtype == torch.complex64, native.threads()]
    return alive, [*sizes, *map(native.address, alive), native.address(kernel)]
