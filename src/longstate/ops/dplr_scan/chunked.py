"""Steps of a diagonal minus a low rank by Woodbury's identity, one after the other, for all sequences and channels.

With E = 1/(1 − hΛ), s(x) = Q* x and h = αΔ, the solution of (I − hA) x = w is

    x = E w − h E P s,    (I + h Q* E P) s = Q* E w,

in which only r × r matrices are solved. Of conjugate modes one is kept, and Q* x stands for 2 Re(Q* x), a real number.

The adjoint of A is the same with Λ*, and P and Q exchanged. The backward pass keeps the state before each span of steps
and recomputes the others. Conjugates are written out, since nobody resolves lazy ones in a compiled graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._shapes import Tensor

SPAN = 64


class _System(NamedTuple):
    """A = Λ − P Q* with channels first.

    Attributes:
        poles: Λ ``[d 1 n]``.
        P: ``[d n r]``.
        Q: ``[d n r]``.
        products: Q and P*, term by term, to read Q* E P from E with: ``[d n r·r]``.
    """

    poles: Tensor
    P: Tensor
    Q: Tensor
    products: Tensor

    @classmethod
    def of(cls, poles: Tensor, P: Tensor, Q: Tensor) -> _System:
        return cls(poles, P, Q, (Q[..., None] * torch.conj_physical(P)[:, :, None]).flatten(2))

    def adjoint(self) -> _System:
        return _System.of(torch.conj_physical(self.poles), self.Q, self.P)

    def apply(self, x: Tensor) -> Tensor:
        """Return A x, ``[d b n]``."""
        return self.poles * x - _spread(_read(x, self.Q), self.P)

    def solve(self, w: Tensor, h: Tensor) -> Tensor:
        """Return (I − h A)⁻¹ w for ``[d b n]`` and h ``[d b 1]``."""
        E = 1 / (1 - h * self.poles)
        x = E * w
        s, G = _read(x, self.Q), h * _read(E, self.products)
        return x - h * E * _spread(_solve(G, s), self.P)


def _solve(G: Tensor, s: Tensor) -> Tensor:
    """Return (I + G)⁻¹ s for G ``[d b r·r]`` and s ``[d b r]``."""
    rank = s.shape[-1]
    if rank == 1:
        return s / (1 + G)
    if rank == 2:  # Cramer's rule: a library takes far longer for matrices so small
        a, b, c, d = (G + torch.eye(2, dtype=G.dtype, device=G.device).flatten()).unbind(-1)
        first, second = s.unbind(-1)
        return torch.stack([d * first - b * second, a * second - c * first], -1) / (a * d - b * c)[..., None]
    identity = torch.eye(rank, dtype=G.dtype, device=G.device)
    # Without a look at errors, for which a GPU would have to be waited for.
    return torch.linalg.solve_ex(identity + G.unflatten(-1, (rank, rank)), s)[0]


def _read(x: Tensor, M: Tensor) -> Tensor:
    """Return M* x for x ``[d b n]`` and M ``[d n r]``: ``[d b r]``, twice the real part of complex ones."""
    return 2 * (x.real @ M.real + x.imag @ M.imag) if x.is_complex() else x @ M


def _spread(s: Tensor, P: Tensor) -> Tensor:
    """Return P s for real s ``[d b r]``."""
    return torch.complex(s @ P.real.mT, s @ P.imag.mT) if P.is_complex() else s @ P.mT


class _Steps(NamedTuple):
    """What each step brings, with time and channels first.

    Attributes:
        u: Inputs ``[t d b 1]``.
        dt: Δ ``[t d b 1]``.
        goes_on: 0 where a sequence begins, else 1: ``[t 1 b 1]``; absent where it is 1 everywhere.
    """

    u: Tensor
    dt: Tensor
    goes_on: Tensor | None

    @classmethod
    def of(cls, u: Tensor, dt: Tensor, start: Tensor | None) -> _Steps:
        goes_on = None if start is None else (~start).to(u.dtype).T[:, None, :, None]
        return cls(u.permute(1, 2, 0)[..., None], dt.permute(1, 2, 0)[..., None], goes_on)

    def enter(self, x: Tensor, t: int) -> Tensor:
        """Return the state with which a step begins; of its gradient, that of the state before."""
        return x if self.goes_on is None else x * self.goes_on[t]

    def forward(self, x: Tensor, t: int, system: _System, B: Tensor, alpha: float) -> Tensor:
        """Return the state after a step from the one with which it begins."""
        h = self.dt[t]
        right = x + h * (B * self.u[t])
        if alpha < 1:
            right = right + (1 - alpha) * h * system.apply(x)
        return system.solve(right, alpha * h) if alpha > 0 else right


def dplr_scan(
    u: Tensor,
    dt: Tensor,
    poles: Tensor,
    P: Tensor,
    Q: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    start: Tensor | None,
    alpha: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t d]``, the final state ``[b d n]``, and the states around spans ``[i+1 d b n]``.

    The last are for the backward pass: none are returned unless asked to ``keep`` them.
    """
    poles, P, Q, B, C, initial = (x.resolve_conj() for x in (poles, P, Q, B, C, initial))
    system, steps = _System.of(poles[:, None], P, Q), _Steps.of(u, dt, start)
    x, kept, outputs = initial.transpose(0, 1), [], []
    drive, output = B[:, None], torch.conj_physical(C)[..., None]
    for t in range(u.shape[1]):
        if t % SPAN == 0:
            kept.append(x)
        x = steps.forward(steps.enter(x, t), t, system, drive, alpha)
        outputs.append(_read(x, output)[..., 0])
    kept.append(x)
    y = torch.stack(outputs).permute(2, 0, 1) if outputs else u.clone()
    return y, x.transpose(0, 1), torch.stack(kept) if keep else initial.new_empty(0)


def dplr_scan_backward(
    grad: Tensor,
    grad_final: Tensor,
    u: Tensor,
    dt: Tensor,
    poles: Tensor,
    P: Tensor,
    Q: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None,
    kept: Tensor,
    alpha: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, dt, poles, P, Q, B, C and the initial state.

    A step is x′ = x + Δ (A z + B u) with z = α x′ + (1 − α) x. Of q = (I − αΔA)⁻* ∂x′, those of A, Δ, B and u are the
    derivatives of Re q* Δ (A z + B u), and that of x is (I + (1−α)ΔA)* q.
    """
    grad_final, poles, P, Q, B, C = (x.resolve_conj() for x in (grad_final, poles, P, Q, B, C))
    system, steps = _System.of(poles[:, None], P, Q), _Steps.of(u, dt, start)
    adjoint, drive, output = system.adjoint(), B[:, None], torch.conj_physical(C)[:, None]
    twice = 2 if poles.is_complex() else 1
    g, of_steps = grad_final.transpose(0, 1), _Steps.of(grad, dt, start)
    grad_u, grad_dt = torch.zeros_like(steps.u), torch.zeros_like(steps.dt)
    sums = [torch.zeros_like(x) for x in (poles, P, Q, B, C)]
    for begin in reversed(range(0, u.shape[1], SPAN)):
        span = range(begin, min(begin + SPAN, u.shape[1]))
        before, after, x = [], [], kept[begin // SPAN]
        for t in span:
            before.append(steps.enter(x, t))
            x = steps.forward(before[-1], t, system, drive, alpha)
            after.append(x)
        adjoints = []
        for t in reversed(span):
            g = g + twice * output * of_steps.u[t]
            q = adjoint.solve(g, alpha * steps.dt[t]) if alpha > 0 else g
            adjoints.append(q)
            g = steps.enter(q + (1 - alpha) * steps.dt[t] * adjoint.apply(q) if alpha < 1 else q, t)
        at = slice(span.start, span.stop)
        # [d s·b n]: the steps of the span are as many more sequences.
        q, x_0, x_1 = (torch.stack(x, 1).flatten(1, 2) for x in (adjoints[::-1], before, after))
        z = alpha * x_1 + (1 - alpha) * x_0
        here, h, g_y = (x[at].transpose(0, 1).flatten(1, 2) for x in (steps.u, steps.dt, of_steps.u))
        rate = system.apply(z) + drive * here
        of_rate = h * q
        for total, moved in ((grad_dt, _inner(q, rate)), (grad_u, _inner(of_rate, drive))):
            total[at] = moved.unflatten(1, (len(span), -1)).transpose(0, 1)
        read, written = _read(z, Q), _read(of_rate, P)
        for total, one in zip(
            sums,
            (
                (torch.conj_physical(z) * of_rate).sum(1),
                -of_rate.mT @ read.to(q.dtype),
                -z.mT @ written.to(q.dtype),
                (here * of_rate).sum(1),
                twice * (g_y * torch.conj_physical(x_1)).sum(1),
            ),
            strict=True,
        ):
            total += one
    by_step = (x[..., 0].permute(2, 0, 1) for x in (grad_u, grad_dt))
    return (*by_step, *sums, g.transpose(0, 1))


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Return Re x* y, summed over states: ``[d b 1]``."""
    product = torch.conj_physical(x) * y
    return (product.real if product.is_complex() else product).sum(-1, keepdim=True)
