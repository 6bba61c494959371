"""The recurrence with a fixed matrix, in chunks that run beside each other.

A first pass finds what each chunk makes of a state of zero. Between chunks, states follow the same recurrence, with a
power of the matrix and far fewer steps, and a second pass runs every chunk from its own. That is twice the work of a
loop over time, and as many products one after the other as a few chunks have steps.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..._shapes import Tensor

CHUNK = 32


def matrix_scan(A: Tensor, b: Tensor, initial: Tensor, start: Tensor | None) -> Tensor:
    """Return every state ``[b t n]``."""
    batch, length, n = b.shape
    if length <= CHUNK:
        return _steps(A, b, initial, start)
    count = -(-length // CHUNK)
    rest = count * CHUNK - length
    blocks = pad(b, (0, 0, 0, rest)).reshape(batch * count, CHUNK, n)
    starts = None if start is None else pad(start, (0, rest)).reshape(batch * count, CHUNK)
    ends = _steps(A, blocks, b.new_zeros(batch * count, n), starts)[:, -1].view(batch, count, n)
    cut = None if starts is None else starts.view(batch, count, CHUNK).any(2)
    between = matrix_scan(torch.linalg.matrix_power(A, CHUNK), ends, initial, cut)
    before = torch.cat([initial[:, None], between[:, :-1]], 1).reshape(batch * count, n)
    return _steps(A, blocks, before, starts).view(batch, count * CHUNK, n)[:, :length]


def _steps(A: Tensor, b: Tensor, h: Tensor, start: Tensor | None) -> Tensor:
    states = torch.empty_like(b)
    for t in range(b.shape[1]):
        if start is not None:
            h = h.masked_fill(start[:, t, None], 0)
        h = torch.addmm(b[:, t], h, A.mT)
        states[:, t] = h
    return states
