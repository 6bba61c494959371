"""The recurrence by odd–even reduction: O(t) work in 2 log₂ t passes over whole tensors.

Neighbours are combined in pairs, h_{2i+1} = (a_{2i+1} a_{2i}) ∘ h_{2i−1} + (a_{2i+1} b_{2i} + b_{2i+1}); that is the
same recurrence at half the length. Its states are every second one, and one product each gives those between
(Blelloch, 1990). Only products of coefficients appear, never quotients, so that zeros and small coefficients are as
exact as in the loop.
"""

from __future__ import annotations

import torch

from ..._shapes import Tensor


def scan(a: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Return every state ``[b t …]`` and the last one; ``a`` is ``[…]`` or ``[b t …]``."""
    if b.shape[1] == 0:
        return torch.empty_like(b), initial.clone()
    first = (a[:, :1] if a.ndim == b.ndim else a) * initial[:, None] + b[:, :1]
    if b.shape[1] == 1:
        return first, first[:, 0].clone()
    h = odd_even(a, torch.cat([first, b[:, 1:]], 1))
    return h, h[:, -1].clone()


def odd_even(a: Tensor, b: Tensor) -> Tensor:
    """Return the states from a zero initial state, for at least one step."""
    length = b.shape[1]
    if length == 1:
        return b
    per_step = a.ndim == b.ndim
    a_odd, a_next = (a[:, 1::2], a[:, 2::2]) if per_step else (a, a)
    pairs = torch.addcmul(b[:, 1::2], a_odd, b[:, : length - 1 : 2])
    h_odd = odd_even(a_odd * a[:, : length - 1 : 2] if per_step else a * a, pairs)
    h = torch.empty_like(b)
    h[:, 0] = b[:, 0]
    h[:, 1::2] = h_odd
    if length > 2:
        torch.addcmul(b[:, 2::2], a_next, h_odd[:, : (length - 1) // 2], out=h[:, 2::2])
    return h
