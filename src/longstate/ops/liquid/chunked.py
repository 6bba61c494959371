"""The portable form. The recurrence is not linear: there is nothing to join over chunks, and it runs step by step.

What it spares is memory: states are kept, and what lies inside a step is computed again in the backward pass.
"""

from __future__ import annotations

import torch

from ..._shapes import Tensor
from .reference import liquid as liquid
from .reference import step


def liquid_backward(
    grad: Tensor,
    u: Tensor,
    recurrent: Tensor,
    rate: Tensor,
    target: Tensor,
    dt: Tensor,
    initial: Tensor,
    start: Tensor | None,
    valid: Tensor | None,
    steps: int,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors from ``u`` on; ``states`` are what was returned."""
    grad_u, grad_dt = torch.zeros_like(u), torch.zeros_like(dt)
    shared = [torch.zeros_like(x) for x in (recurrent, rate, target)]
    adjoint = torch.zeros_like(initial)
    for t in range(u.shape[1] - 1, -1, -1):
        adjoint = adjoint + grad[:, t]
        before = states[:, t - 1] if t else initial
        if start is not None:
            before = torch.where(start[:, t, None], 0, before)
        given = [x.detach().requires_grad_() for x in (before, u[:, t], recurrent, rate, target, dt[:, t])]
        h, u_t, recurrent, rate, target, dt_t = given
        with torch.enable_grad():
            after = step(h, u_t, recurrent, rate, target, dt_t, steps)
        into = adjoint if valid is None else torch.where(valid[:, t, None], adjoint, 0)
        through, grad_u[:, t], *parts, grad_dt[:, t] = torch.autograd.grad(after, given, into)
        for total, part in zip(shared, parts, strict=True):
            total += part
        # What does not count passes the state on; where a sequence begins nothing comes from before.
        adjoint = through if valid is None else through + torch.where(valid[:, t, None], 0, adjoint)
        if start is not None:
            adjoint = torch.where(start[:, t, None], 0, adjoint)
    return grad_u, *shared, grad_dt, adjoint
