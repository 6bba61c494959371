"""HiPPO-LegS against dense matrices, against projections by quadrature, and its indifference to the scale of time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import Legendre
from scipy.integrate import quad
from scipy.linalg import expm

import contract
from longstate import HiPPOLegS, Timeline
from longstate.mixers._legendre import (
    dilation,
    exact_by_entry,
    exact_by_step,
    gauss,
    legendre,
    rational_by_entry,
    rational_by_step,
)
from longstate.systems import legs, scale_invariant_step

IMPLICIT = {"bilinear": 0.5, "backward_euler": 1.0, "euler": 0.0}
RULES = (*IMPLICIT, "zoh")


def build(n: int, rule: Any, **options: Any) -> HiPPOLegS:
    torch.manual_seed(3)
    return HiPPOLegS(2, n, rule, output="identity", **options).double()


def dense(n: int, rule: str, u: np.ndarray, steps: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
    """Return the memories ``[t d n]`` after each step of length s, by whole matrices."""
    A, B = legs(n)
    c, found = np.zeros((u.shape[1], n)) if memory is None else memory, []
    implicit = IMPLICIT.get(rule)
    for u_t, s in zip(u, steps, strict=True):
        if implicit is None:
            block = np.zeros((n + 1, n + 1))
            block[:n, :n], block[:n, n] = A, B
            exponential = expm(np.log1p(s) * block)
            c = c @ exponential[:n, :n].T + u_t[:, None] * exponential[:n, n]
        else:
            right = c @ (np.eye(n) + (1 - implicit) * s * A).T + s * u_t[:, None] * B
            c = np.linalg.solve(np.eye(n) - implicit * s * A, right.T).T
        found.append(c)
    return np.stack(found)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("n", [1, 2, 6, 24])
@pytest.mark.parametrize("rule", RULES)
def test_every_face_is_the_recurrence_with_dense_matrices(rule: str, n: int, length: int) -> None:
    mixer = build(n, rule)
    x = torch.randn(1, 6 + length, 2, dtype=torch.float64)
    memories = dense(n, rule, x[0].numpy(), 1 / np.arange(1, 7 + length))
    with torch.no_grad():
        _, state = mixer(x[:, :6])  # one step after another where there are fewer than entries
        y, final = mixer(x[:, 6:], state)
    wanted = (memories * mixer.C.detach().numpy()).sum(-1)
    size = np.abs(memories).max()
    assert np.abs(state.memory[0].numpy() - memories[5]).max() < 1e-12 * size
    assert np.abs(final.memory[0].numpy() - memories[-1]).max() < 1e-12 * size
    assert np.abs(y[0].numpy() - wanted[6:]).max() < 1e-11 * size
    assert final.elapsed.tolist() == [6 + length]


@pytest.mark.parametrize("rule", RULES)
def test_both_faces_from_any_memory_across_starts(rule: str) -> None:
    u, C = torch.randn(2, 12, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    memory, step = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 12, dtype=torch.float64)
    start = torch.zeros(2, 12, dtype=torch.bool)
    start[0, 0] = start[0, 7] = start[1, 4] = start[1, 5] = True
    for row, cuts in enumerate(([0, 7, 12], [0, 4, 5, 12])):
        c, wanted = memory[row].numpy() * (row > 0), []
        for begin, end in pairwise(cuts):
            found = dense(4, rule, u[row, begin:end].numpy(), step[row, begin:end].numpy(), c if begin == 0 else None)
            wanted.append(found)
        memories = np.concatenate(wanted)
        for y, last in faces(rule, u, step, memory, C, start):
            np.testing.assert_allclose(y[row], (memories * C.numpy()).sum(-1), atol=1e-12 * np.abs(memories).max())
            np.testing.assert_allclose(last[row], memories[-1], atol=1e-12 * np.abs(memories).max())


def faces(rule: str, *given: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if rule == "zoh":
        return [face(*given, gauss(given[3].shape[1])) for face in (exact_by_step, exact_by_entry)]
    return [face(*given, IMPLICIT[rule]) for face in (rational_by_step, rational_by_entry)]


@pytest.mark.parametrize("rule", ["bilinear", "backward_euler", "euler"])
def test_its_steps_are_those_of_the_systems(rule: str) -> None:
    u = torch.randn(9, 1, dtype=torch.float64)
    A, B = legs(4)
    c = np.zeros(4)
    for k in range(1, 10):
        A_k, B_k = scale_invariant_step(A, B, k, rule)
        c = A_k @ c + B_k * u[k - 1].item()
    with torch.no_grad():
        _, state = HiPPOLegS(1, 4, rule).double()(u[None])
    np.testing.assert_allclose(state.memory[0, 0], c, atol=1e-12 * np.abs(c).max())


@pytest.mark.parametrize("rule", RULES)
def test_irregular_steps(rule: str) -> None:
    mixer = build(5, rule, t_0=3.0)
    x, dt = torch.randn(1, 30, 2, dtype=torch.float64), 0.1 + 2 * torch.rand(1, 30, dtype=torch.float64)
    age = 3 + dt[0].cumsum(0).numpy() - dt[0].numpy()
    memories = dense(5, rule, x[0].numpy(), dt[0].numpy() / age)
    with torch.no_grad():
        _, final = mixer(x, None, Timeline(dt))
    assert np.abs(final.memory[0].numpy() - memories[-1]).max() < 1e-12 * np.abs(memories).max()
    np.testing.assert_allclose(final.elapsed, dt.sum(1))


def test_the_exact_memory_is_the_projection_of_the_held_input() -> None:
    """Onto Legendre polynomials over all of its age, the time before the first step counted as zeros."""
    mixer = build(7, "zoh", t_0=0.7)
    x, dt = torch.randn(1, 20, 2, dtype=torch.float64), 0.1 + 2 * torch.rand(1, 20, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x, None, Timeline(dt))
    times = 0.7 + np.concatenate([[0], dt[0].cumsum(0).numpy()])
    for d in range(2):
        for k in range(7):
            p = Legendre.basis(k, domain=[0, times[-1]])
            pieces = [x[0, i, d].item() * quad(p, times[i], times[i + 1], epsabs=1e-13)[0] for i in range(20)]
            assert abs(state.memory[0, d, k].item() - (2 * k + 1) ** 0.5 * sum(pieces) / times[-1]) < 1e-11


@pytest.mark.parametrize("n", [1, 2, 8, 32, 64])
def test_a_dilation_is_the_exponential_of_legs(n: int) -> None:
    steps = torch.tensor([0.0, 1e-6, 0.03, 1.0, 50.0], dtype=torch.float64)
    got = dilation(steps, gauss(n)).numpy()
    for matrix, s in zip(got, steps.numpy(), strict=True):
        np.testing.assert_allclose(matrix, expm(np.log1p(s) * legs(n)[0]), atol=1e-12 * n)
    both = (1 + steps[2]) * (1 + steps[3]) - 1
    np.testing.assert_allclose(got[2] @ got[3], dilation(both, gauss(n)).numpy(), atol=1e-12 * n)


@pytest.mark.parametrize("rule", RULES)
def test_a_slower_signal_leaves_the_same_memory(rule: str) -> None:
    """All that is asked of time is its ratios; a memory with a scale of its own would not pass."""
    x, dt = torch.randn(1, 30, 2, dtype=torch.float64), 0.5 + torch.rand(1, 30, dtype=torch.float64)
    with torch.no_grad():
        y, state = build(6, rule, t_0=2.0)(x, None, Timeline(dt))
        slow, later = build(6, rule, t_0=5.0)(x, None, Timeline(2.5 * dt))
        other, _ = build(6, rule, t_0=2.0)(x, None, Timeline(2.5 * dt))
    torch.testing.assert_close((slow, later.memory), (y, state.memory), rtol=0, atol=1e-12 * y.abs().max().item())
    assert (other - y).abs().max() > 1e-2


def test_a_signal_held_for_longer_leaves_the_same_memory() -> None:
    x = torch.randn(1, 30, 2, dtype=torch.float64)
    with torch.no_grad():
        y, state = build(6, "zoh")(x)
        slow, later = build(6, "zoh", t_0=4.0)(x.repeat_interleave(4, 1))
    torch.testing.assert_close((slow[:, 3::4], later.memory), (y, state.memory), rtol=0, atol=1e-12)


def test_a_polynomial_comes_back() -> None:
    p = Legendre([0.3, -1, 0.5, 0.7], domain=[0, 1])
    at = np.linspace(0, 1, 9)
    errors = []
    for length in (500, 1000):
        signal = torch.from_numpy(p((np.arange(length) + 0.5) / length))
        mixer = build(5, "bilinear", t_0=1e-9)
        with torch.no_grad():
            # The first step, which is all of the past there is then, sets the memory to its input.
            first = torch.cat([signal[:1], torch.zeros(4, dtype=torch.float64)]).expand(1, 2, 5)
            state = mixer.initial_state(1)._replace(memory=first, elapsed=torch.ones(1, dtype=torch.float64))
            _, state = mixer(signal[None, 1:, None].expand(1, -1, 2), state)
        errors.append(np.abs(mixer.reconstruct(state, torch.from_numpy(at)).numpy() - p(at)).max())
    assert errors[0] < 0.02 and errors[1] < 0.6 * errors[0]


def test_legendre_polynomials_are_those_of_numpy() -> None:
    at = torch.linspace(0, 1, 7, dtype=torch.float64)
    for n in (1, 2, 20):
        wanted = [(2 * k + 1) ** 0.5 * Legendre.basis(k, domain=[0, 1])(at.numpy()) for k in range(n)]
        np.testing.assert_allclose(legendre(n, at), np.stack(wanted, -1), atol=1e-12)


@pytest.mark.parametrize("rule", ["bilinear", "zoh", "backward_euler"])
def test_many_coefficients_over_many_steps(rule: str) -> None:
    """No product of powers is ever formed: 64 coefficients are as exact as the loop, in float32 to its own digits."""
    x = torch.randn(1, 300, 2, dtype=torch.float64)
    memories = dense(64, rule, x[0].numpy(), 1 / np.arange(1, 301))
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        mixer = build(64, rule).to(dtype)
        with torch.no_grad():
            y, state = mixer(x.to(dtype))
            wanted = (memories * mixer.C.double().numpy()).sum(-1)
            pieces = [mixer(x[:, :250].to(dtype))]
            pieces.append(mixer(x[:, 250:].to(dtype), pieces[0][1]))  # fewer steps than coefficients
        size = np.abs(memories).max()
        assert np.abs(state.memory[0].double().numpy() - memories[-1]).max() < bound * size
        assert np.abs(y[0].double().numpy() - wanted).max() < bound * np.abs(wanted).max()
        assert (torch.cat([p[0] for p in pieces], 1) - y).abs().max() < bound * y.abs().max()


def exact() -> HiPPOLegS:
    return HiPPOLegS(3, 3, "zoh", t_0=2.0)


def test_the_exact_rule_keeps_the_contract_too() -> None:
    contract.check_pieces(exact, torch.float64, "dt start valid")
    contract.check_gradients(exact, "dt start valid")
    contract.check_packing(exact, "dt valid")


@pytest.mark.compiled
def test_the_exact_rule_is_exported_for_any_length() -> None:
    contract.check_export(exact, "dt start valid", with_state=True)


def test_what_is_trained() -> None:
    mixer = HiPPOLegS(3, 4)
    assert {name for name, _ in mixer.named_parameters()} == {"C", "output.linear.weight", "output.linear.bias"}
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {"output.linear.weight", "output.linear.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=64"),
        ({"discretization": "tustin"}, "bilinear"),
        ({"t_0": 0.0}, "t_0=1.0"),
        ({"output": "gate"}, "glu"),
    ],
)
@pytest.mark.compiled  # apart from the run-time checks, which see a wrong literal first
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiPPOLegS(3, **options)
