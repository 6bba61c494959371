"""Liquid time-constant neurons, one small semi-implicit step after the other: the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch


def liquid(
    u: torch.Tensor,
    recurrent: torch.Tensor,
    rate: torch.Tensor,
    target: torch.Tensor,
    dt: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    valid: torch.Tensor | None,
    steps: int,
) -> torch.Tensor:
    """Return the state ``[b t n]`` after every step; where one does not count, that before it."""

    def advance(h: torch.Tensor, t: int) -> torch.Tensor:
        return step(h, u[:, t], recurrent, rate, target, dt[:, t], steps)

    return loop(advance, initial, start, valid, u.shape[1])


def step(
    h: torch.Tensor,
    u: torch.Tensor,
    recurrent: torch.Tensor,
    rate: torch.Tensor,
    target: torch.Tensor,
    dt: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Return the state ``[b n]`` after one step, of so many small ones."""
    small = (dt / steps)[:, None]
    for _ in range(steps):
        f = torch.sigmoid(u + h @ recurrent.mT)
        h = (h + small * f * target) / (1 + small * (rate + f))
    return h


def loop(
    advance: Callable[[torch.Tensor, int], torch.Tensor],
    initial: torch.Tensor,
    start: torch.Tensor | None,
    valid: torch.Tensor | None,
    length: int,
) -> torch.Tensor:
    """Return the states of any recurrence h_t = advance(h_{t−1}, t), with starts and steps that do not count."""
    h, states = initial, []
    for t in range(length):
        if start is not None:
            h = torch.where(start[:, t, None], 0, h)
        after = advance(h, t)
        h = after if valid is None else torch.where(valid[:, t, None], after, h)
        states.append(h)
    return torch.stack(states, 1) if states else initial.new_zeros(initial.shape[0], 0, initial.shape[1])
