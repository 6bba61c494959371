"""Layers of continuous time at their own rate, at half of it and at irregular steps: the same system, by SciPy.

A mixer is added by a line in ``CASES``: how to build it as a linear system alone, its dense continuous matrices, and
the order at which its rule comes to them, or none where the rule is exact for inputs held over their steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.signal import lsim

from longstate import DSS, FFM, LSSL, S4, S4D, S5, LinOSS, Mixer, Timeline
from longstate.routes import HiSS
from mixers.test_time_invariant import channels, complex_, realified

STEPS = 24
# A, B, C, D with time in nominal steps, and the channels that they serve.
System = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, slice]


class Case(NamedTuple):
    """A mixer of two channels, its systems, and the order of its rule."""

    name: str
    make: Callable[[], Mixer]
    systems: Callable[[Mixer], list[System]]
    order: int | None = None


def oscillators(mixer: LinOSS) -> list[System]:
    """Return z′ = Δ(−A y + B u), y′ = Δ z, of real and imaginary parts apart: first all z, then all y."""
    a, dt = mixer.A.detach().relu().numpy(), mixer.log_dt.detach().exp().numpy()
    B, C, n, zero = complex_(mixer.B), complex_(mixer.C), len(a), np.zeros((len(a), len(a)))
    A = np.block([[zero, np.diag(-dt * a)], [np.diag(dt), zero]])
    force = np.concatenate([dt[:, None] * B, 0 * B])
    read = np.concatenate([0 * C, C], 1)
    A = np.kron(np.eye(2), A)
    assert A.shape == (4 * n, 4 * n)
    D = np.diag(mixer.D.detach().numpy())
    return [(A, np.concatenate([force.real, force.imag]), np.concatenate([read.real, -read.imag], 1), D, slice(None))]


def low_rank(mixer: S4) -> list[System]:
    """Return dense real systems: of conjugate modes, Q* x is twice the real part of what the modes kept give."""
    poles = -mixer.log_A_real.detach().exp().numpy() + 1j * mixer.A_imag.detach().numpy()
    P, Q, found = complex_(mixer.P), complex_(mixer.P if mixer.Q is None else mixer.Q), []
    for i, dt in enumerate(mixer.log_dt.detach().exp().numpy()):
        inputs, outputs = (
            np.column_stack([complex_(mixer.B)[i], P[i]]),
            np.vstack([complex_(mixer.C)[i], Q[i].conj().T]),
        )
        A, B, C = realified(poles[i], inputs, outputs)
        A = dt * (A - B[:, 1:] @ C[1:])
        found.append((A, dt * B[:, :1], C[:1], mixer.D.detach().numpy()[i : i + 1, None], slice(i, i + 1)))
    return found


def matrices(mixer: LSSL) -> list[System]:
    A, B, C, D, dt = (x.detach().numpy() for x in (mixer.A, mixer.B, mixer.C, mixer.D, mixer.log_dt.exp()))
    return [
        (dt[i] * A[i % len(A)], dt[i] * B[i][:, None], C[i][None], D[i : i + 1, None], slice(i, i + 1))
        for i in range(len(D))
    ]


def weighted_modes(mixer: DSS) -> list[System]:
    """Return h′ = z h + (z/λ) u with y = Re(W h): of each mode alone, not of a conjugate pair."""
    eigenvalues, z = (x.detach().numpy() for x in mixer.modes())
    W, D = complex_(mixer.W), mixer.D.detach().numpy()
    return [
        (*realified(z[i], (z[i] / eigenvalues)[:, None], W[i][None] / 2), D[i : i + 1, None], slice(i, i + 1))
        for i in range(len(D))
    ]


def slow(kind: type, *arguments: object, **options: object) -> Callable[[], Mixer]:
    return lambda: kind(2, *arguments, output="identity", dt_min=0.02, dt_max=0.2, **options).double()


CASES = [
    *(Case(f"s4d {kind}", slow(S4D, 4, kind), channels) for kind in ("legs", "lin", "inv", "quad", "real")),
    *(Case(f"s4d {kind} bilinear", slow(S4D, 4, kind, "bilinear"), channels, 2) for kind in ("legs", "lin", "inv")),
    *(Case(f"s4d {kind} bilinear", slow(S4D, 4, kind, "bilinear"), channels, 2) for kind in ("quad", "real")),
    Case("s5", slow(S5, 8, 2), channels),
    Case("s5 bilinear", slow(S5, 8, discretization="bilinear"), channels, 2),
    Case("dss exp", slow(DSS, 4), weighted_modes),
    *(Case(f"s4 {kind}", slow(S4, 6, kind), low_rank, 2) for kind in ("legs", "legt", "mixed")),
    Case("s4 untied", slow(S4, 4, "fout", False), low_rank, 2),
    Case("lssl", slow(LSSL, 4), matrices, 2),
    Case("lssl backward", slow(LSSL, 4, "legt", False, 1.0), matrices, 1),
    Case("linoss im", slow(LinOSS, 3), oscillators, 1),
    Case("linoss imex", slow(LinOSS, 3, "imex"), oscillators, 1),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def held(systems: list[System], u: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Return the outputs after each gap, over which its input is held, by matrix exponentials."""
    y = np.zeros_like(u)
    for A, B, C, D, at in systems:
        n, h = len(A), np.zeros(len(A))
        block = np.zeros((n + B.shape[1], n + B.shape[1]))
        block[:n, :n], block[:n, n:] = A, B
        for t, gap in enumerate(gaps):
            h = (expm(gap * block) @ np.concatenate([h, u[t, at]]))[:n]
            y[t, at] = C @ h + D @ u[t, at]
    return y


def held_by_lsim(systems: list[System], u: np.ndarray, gap: float) -> np.ndarray:
    """Return the same for gaps that are all alike, by ``scipy.signal.lsim``."""
    y, last = np.zeros_like(u), len(u)
    for A, B, C, D, at in systems:
        given = np.concatenate([u[:, at], u[-1:, at]])  # lsim holds an input over the time after it
        _, _, h = lsim((A, B, C, D), given, gap * np.arange(last + 1), interp=False)
        y[:, at] = h[1:] @ C.T + u[:, at] @ D.T
    return y


def outputs(mixer: Mixer, u: np.ndarray, gaps: np.ndarray | None, finer: int = 1) -> np.ndarray:
    """Return a mixer's outputs after each gap, cut into so many steps over which its input is held."""
    x = torch.from_numpy(u).repeat_interleave(finer, 0)[None]
    when = None
    if gaps is not None:
        when = Timeline(
            torch.from_numpy(gaps / finer).repeat_interleave(finer)[None] if gaps.ndim else torch.tensor(gaps / finer)
        )
    with torch.no_grad():
        return mixer(x, None, when)[0][0, finer - 1 :: finer].numpy()


def build(case: Case) -> tuple[Mixer, list[System], np.ndarray]:
    torch.manual_seed(6)
    mixer = case.make()
    return mixer, case.systems(mixer), torch.randn(STEPS, 2, dtype=torch.float64).numpy()


def check(case: Case, mixer: Mixer, u: np.ndarray, gaps: np.ndarray | None, wanted: np.ndarray) -> None:
    """Equality for a rule that is exact; else errors that fall with the steps as the rule's order says."""
    size = np.abs(wanted).max()
    if case.order is None:
        assert np.abs(outputs(mixer, u, gaps) - wanted).max() < 1e-9 * size
        return
    gaps = np.array(1.0) if gaps is None else gaps
    coarse, fine = (np.abs(outputs(mixer, u, gaps, finer) - wanted).max() / size for finer in (32, 64))
    assert fine < 0.02 and abs(np.log2(coarse / fine) - case.order) < 0.1, (coarse, fine)


@cases
def test_at_its_own_rate(case: Case) -> None:
    mixer, systems, u = build(case)
    check(case, mixer, u, None, held_by_lsim(systems, u, 1.0))


@cases
def test_at_half_the_rate(case: Case) -> None:
    """A step of two nominal ones is two steps with the same input."""
    mixer, systems, u = build(case)
    wanted = held_by_lsim(systems, np.repeat(u, 2, 0), 1.0)[1::2]
    check(case, mixer, u, np.array(2.0), wanted)
    if case.order is None:
        assert np.abs(outputs(mixer, u, np.array(2.0), 2) - outputs(mixer, u, np.array(2.0))).max() < 1e-9
    assert np.abs(outputs(mixer, u, None) - wanted).max() > 1e-2 * np.abs(wanted).max(), "the rate has no effect"


@cases
def test_at_irregular_steps(case: Case) -> None:
    mixer, systems, u = build(case)
    gaps = np.random.default_rng(7).uniform(0.1, 3, STEPS)
    check(case, mixer, u, gaps, held(systems, u, gaps))


@pytest.mark.parametrize("kind", ["s4d", "s5"])
def test_two_scales_of_time(kind: str) -> None:
    """HiSS at irregular steps: each chunk's system from rest, and one over the chunks, as long as they lasted."""
    torch.manual_seed(8)
    parts = [slow(S4D, 4, "lin")(), slow(S5, 8)()]
    lower, higher = parts if kind == "s4d" else parts[::-1]
    mixer, c = HiSS(lower, higher, 5), 5
    u, gaps = torch.randn(STEPS, 2, dtype=torch.float64).numpy(), np.random.default_rng(9).uniform(0.1, 3, STEPS)
    low = np.concatenate([held(channels(lower), u[i : i + c], gaps[i : i + c]) for i in range(0, STEPS, c)])
    lasted = np.add.reduceat(gaps, range(0, STEPS, c))[: STEPS // c] / c
    high = np.concatenate([np.zeros((1, 2)), held(channels(higher), low[c - 1 :: c], lasted)])
    wanted = low + high[np.arange(1, STEPS + 1) // c]
    assert np.abs(outputs(mixer, u, gaps) - wanted).max() < 1e-9 * np.abs(wanted).max()


def test_a_memory_of_events() -> None:
    """FFM adds inputs at instants: a step of two nominal ones is one with nothing, and one with the input."""
    mixer = FFM(2, 3, 2, decay_max=0.3, period_min=5.0, period_max=30.0).double()
    mixer.in_proj.bias.data.zero_()
    u, gaps = torch.randn(1, STEPS, 2, dtype=torch.float64), np.random.default_rng(3).uniform(0.1, 3, STEPS)
    apart = torch.stack([torch.zeros_like(u), u], 2).flatten(1, 2)
    with torch.no_grad():
        y, final = mixer(u, None, Timeline(torch.tensor(2.0)))
        finer, wanted = mixer(apart)
        assert (y - finer[:, 1::2]).abs().max() < 1e-9 and (final.ssm - wanted.ssm).abs().max() < 1e-9
        irregular = mixer(u, None, Timeline(torch.from_numpy(gaps)))[1].ssm[0].numpy()
        added = torch.nn.functional.glu(mixer.in_proj(u))[0].numpy()
    for i, alpha in enumerate(mixer.alpha.detach().numpy()):
        for j, omega in enumerate(mixer.omega.detach().numpy()):
            h = np.zeros(2)  # real and imaginary part
            for gap, jump in zip(gaps, added[:, i], strict=True):
                h = expm(gap * np.array([[-alpha, -omega], [omega, -alpha]])) @ h + [jump, 0]
            assert abs(irregular[i, j] - (h[0] + 1j * h[1])) < 1e-9
