"""The compiled kernels, forwards and backwards in time: each number of the inputs is read once."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor

_KINDS = (torch.float32, torch.bfloat16)


def refusal(a: Tensor, b: Tensor, dtype: torch.dtype) -> str:
    """Return why the kernel does not take such arguments with states of a type; "" if it does."""
    if b.device.type != "cpu" or dtype not in (torch.float32, torch.complex64):
        return "its kernel keeps states in float32 or complex64, on the CPU"
    if dtype == torch.float32 and (a.dtype not in _KINDS or b.dtype not in _KINDS):
        return "its kernel takes float32 and bfloat16"
    return ""


def scan(
    a: Tensor, b: Tensor, initial: Tensor | None, start: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what ``chunked.scan`` returns; of real numbers, a and b may be bfloat16."""
    assert native.kernels is not None
    h = _like(b)
    final = b.new_empty((b.shape[0], *b.shape[2:]), dtype=_state(b)) if initial is None else _like(initial)
    inputs, outputs = _rows(b), _rows(h)
    _alive, given = _given(a, inputs, a.ndim < b.ndim, initial, start, valid)
    native.kernels.scan(*given, *_where(inputs), *_where(outputs), final.data_ptr())
    return h, final


def scan_backward(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``chunked.scan_backward`` returns."""
    assert native.kernels is not None
    fixed = a.ndim < h.ndim
    grad_a, grad_b, grad_initial = _like(grad_final if fixed else a), _like(h), _like(grad_final)
    outputs, grad, grad_final = _rows(h), _rows(grad), grad_final.resolve_conj().contiguous()
    _alive, given = _given(a, outputs, fixed, initial, start, valid)
    sums = (grad_a.data_ptr(), given[2], 0, False)  # of a fixed a, for each sequence
    native.kernels.scan_backward(
        *given,
        *native.rows(None),
        *_where(outputs),
        0,
        *_where(grad),
        grad_final.data_ptr(),
        *(sums if fixed else _where(_rows(grad_a))),
        *_where(_rows(grad_b)),
        grad_initial.data_ptr(),
    )
    return grad_a.sum(0).to(a.dtype) if fixed else grad_a, grad_b, grad_initial


def _like(x: Tensor) -> Tensor:
    if x.numel() < 1 << 16:  # half the time of the other, where that counts
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return native.empty(x.shape, x.dtype)


def _state(x: Tensor) -> torch.dtype:
    return torch.complex64 if x.is_complex() else torch.float32


def _rows(x: Tensor) -> Tensor:
    """Return ``[b t …]`` as rows ``[b t n]`` of numbers side by side."""
    if x.ndim != 3:
        x = x.flatten(2) if x.ndim > 3 else x.unsqueeze(2)
    return native.in_rows(x.resolve_conj())


def _where(x: Tensor) -> tuple[int, int, int, bool]:
    """Return where rows are, in floats: a complex number is two of them."""
    at, batch, row, narrow = native.rows(x)
    return (at, 2 * batch, 2 * row, narrow) if x.is_complex() else (at, batch, row, narrow)


def _given(
    a: Tensor, rows: Tensor, fixed: bool, initial: Tensor | None, start: Tensor | None, valid: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Return the tensors that must stay alive, and what the kernels begin with; ``rows`` are those of b or h."""
    batch, length, width = rows.shape
    pairs = rows.is_complex()
    a = native.in_rows(a.resolve_conj().reshape(1, 1, -1)).expand(rows.shape) if fixed else _rows(a)
    initial = None if initial is None else initial.resolve_conj().contiguous()
    start, valid = None if start is None else start.contiguous(), None if valid is None else valid.contiguous()
    sizes = (batch, length, 2 * width if pairs else width, pairs, native.threads())
    where = (native.address(initial), native.address(start), native.address(valid))
    return (a, initial, start, valid), (*sizes, *_where(a), *where)
