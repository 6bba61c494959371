"""LinOSS against its equations solved step by step, and against the oscillators by SciPy; its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from longstate import LinOSS, Timeline


def complex_(x: torch.Tensor) -> np.ndarray:
    return torch.view_as_complex(x.detach().double()).numpy()


def stiffness(mixer: LinOSS) -> np.ndarray:
    A = mixer.A.detach().double().numpy()
    return np.exp(A) if mixer.nonnegative == "exp" else np.maximum(A, 0)


def build(rule: str, nonnegative: str = "relu", **options: float) -> LinOSS:
    torch.manual_seed(2)
    mixer = LinOSS(2, 4, rule, nonnegative, output="identity", **options).double()
    with torch.no_grad():
        mixer.A[0] = -0.5  # no spring: relu gives A = 0, where M has one eigenvector only
    return mixer


@pytest.mark.parametrize("nonnegative", ["relu", "exp"])
@pytest.mark.parametrize("rule", ["im", "imex"])
def test_irregular_steps_by_the_equations_of_each(rule: str, nonnegative: str) -> None:
    """z_t = z_{t−1} + Δ(−A y_{t or t−1} + B u_t), y_t = y_{t−1} + Δ z_t, solved as they stand."""
    mixer = build(rule, nonnegative, dt_max=0.5)
    x, elapsed = torch.randn(1, 90, 2, dtype=torch.float64), 0.1 + 1.5 * torch.rand(1, 90, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x, None, Timeline(elapsed))[0][0].numpy()
    A, B, C, D = stiffness(mixer), complex_(mixer.B), complex_(mixer.C), mixer.D.detach().numpy()
    dt, wanted = mixer.log_dt.detach().exp().numpy(), np.zeros_like(got)
    for j in range(4):
        z = y = 0j
        for t in range(90):
            step = dt[j] * elapsed[0, t].item()
            force = B[j] @ x[0, t].numpy()
            if rule == "im":
                left = np.array([[1, step * A[j]], [-step, 1]])
                z, y = np.linalg.solve(left.astype(complex), np.array([z + step * force, y]))
            else:
                z = z + step * (-A[j] * y + force)
                y = y + step * z
            wanted[t] += (C[:, j] * y).real
    wanted += D * x[0].numpy()
    assert np.abs(got - wanted).max() < 1e-10 * np.abs(wanted).max()


@pytest.mark.parametrize("rule", ["im", "imex"])
def test_shorter_steps_come_to_the_oscillators_simulated_by_scipy(rule: str) -> None:
    """The same input on a grid 4 times finer: errors against y″ = −A y + B u are a quarter, as of first-order rules."""
    mixer = build(rule, dt_min=0.05, dt_max=0.1)
    A, B, C = stiffness(mixer), complex_(mixer.B), complex_(mixer.C)
    dt, D = mixer.log_dt.detach().exp().numpy(), mixer.D.detach().numpy()
    u = torch.randn(20, 2, dtype=torch.float64).numpy()  # held over 4 nominal steps each

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        z, y = state.reshape(2, 4)
        return np.concatenate([dt * (-A * y + B @ u[min(int(t // 4), 19)]), dt * z])

    state, exact = np.zeros(8, complex), []
    for i in range(20):
        state = solve_ivp(slope, (4 * i, 4 * i + 4 - 1e-9), state, rtol=1e-10, atol=1e-12).y[:, -1]
        exact.append((C @ state[4:]).real + D * u[i])
    errors = []
    for finer in (4, 16):
        x = torch.from_numpy(u).repeat_interleave(4 * finer, 0)[None]
        with torch.no_grad():
            got = mixer(x, None, Timeline(torch.tensor(1 / finer, dtype=torch.float64)))[0][0].numpy()
        errors.append(np.abs(got[4 * finer - 1 :: 4 * finer] - np.array(exact)).max() / np.abs(exact).max())
    assert errors[1] < 0.02 and 3.5 < errors[0] / errors[1] < 4.5, errors


def test_a_rule_keeps_or_loses_the_volume_it_should() -> None:
    mixers = {rule: LinOSS(3, 50, rule).double() for rule in ("im", "imex")}
    for rule, mixer in mixers.items():
        with torch.no_grad():
            mixer.A.copy_(2 * torch.randn(50))  # wherever an optimiser may have taken it
            M = mixer._transition(mixer.log_dt.exp())[0]
        radius = np.abs(np.linalg.eigvals(M.numpy())).max(-1)
        at_rest = stiffness(mixer) == 0
        assert at_rest.any() and not at_rest.all()
        if rule == "im":
            assert (radius[~at_rest] < 1).all()
            np.testing.assert_allclose(radius[at_rest], 1, atol=1e-7)
        else:
            stable = stiffness(mixer) * np.exp(2 * mixer.log_dt.detach().numpy()) < 3.9
            np.testing.assert_allclose(radius[stable], 1, atol=1e-7)
            np.testing.assert_allclose(np.linalg.det(M.numpy()), 1, rtol=1e-12)


def test_initial_values_and_weight_decay() -> None:
    mixer = LinOSS(9, 4000, dt_min=0.1, dt_max=0.4)
    A = mixer.A.detach().numpy()
    assert 0 < A.min() < 0.01 and 0.99 < A.max() <= 1 and abs(A.mean() - 0.5) < 0.02
    assert abs(mixer.B.abs().max().item() - 1 / 3) < 1e-3
    assert abs(mixer.C.abs().max().item() - 1 / math.sqrt(4000)) < 1e-4
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {"output.linear.weight", "output.linear.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state"),
        ({"rule": "ex"}, "imex"),
        ({"nonnegative": "square"}, "relu"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"output": "gate"}, "glu"),
    ],
)
@pytest.mark.compiled  # apart from the run-time checks, which see a wrong literal first
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinOSS(3, **options)
