"""LTC against its differential equation solved by SciPy; its bounds; and the solvers of torchdiffeq."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from longstate import LTC, Timeline


def build(solver: str = "fused", **options: float) -> LTC:
    if solver != "fused":
        pytest.importorskip("torchdiffeq")
    torch.manual_seed(3)
    mixer = LTC(2, 5, solver, dt=0.7, **options).double()
    with torch.no_grad():
        mixer.U.mul_(4)
    return mixer


def material() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(1, 25, 2, dtype=torch.float64), 0.2 + 2 * torch.rand(1, 25, dtype=torch.float64)


def by_scipy(mixer: LTC, x: torch.Tensor, dt: torch.Tensor) -> np.ndarray:
    """Return the states after each step: the equation as it stands, with inputs held."""
    W, b = mixer.in_proj.weight.detach().numpy(), mixer.in_proj.bias.detach().numpy()
    U, A, tau = mixer.U.detach().numpy(), mixer.A.detach().numpy(), np.exp(mixer.log_tau.detach().numpy())

    def slope(_: float, h: np.ndarray, u: np.ndarray) -> np.ndarray:
        f = 1 / (1 + np.exp(-(W @ u + U @ h + b)))
        return -(1 / tau + f) * h + f * A

    h, states = np.zeros(5), []
    for u, elapsed in zip(x[0].numpy(), dt[0].numpy(), strict=True):
        h = solve_ivp(slope, (0, mixer.dt * elapsed), h, args=(u,), rtol=1e-10, atol=1e-12).y[:, -1]
        states.append(mixer.out_proj.weight.detach().numpy() @ h + mixer.out_proj.bias.detach().numpy())
    return np.array(states)


def error(mixer: LTC) -> float:
    x, dt = material()
    with torch.no_grad():
        return float(np.abs(mixer(x, None, Timeline(dt))[0][0].numpy() - by_scipy(mixer, x, dt)).max())


def test_small_steps_come_to_the_equation_solved_by_scipy() -> None:
    errors = [error(build(steps=steps)) for steps in (6, 50, 100)]
    assert errors[0] < 0.05 and 1.9 < errors[1] / errors[2] < 2.1, errors


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_solvers_with_small_steps(solver: str, order: int) -> None:
    errors = [error(build(solver, steps=steps)) for steps in (8, 16)]
    assert errors[1] < 0.02 and abs(np.log2(errors[0] / errors[1]) - order) < 0.5, errors


@pytest.mark.parametrize(("solver", "bound"), [("dopri5", 1e-8), ("bosh3", 1e-6)])
def test_adaptive_solvers(solver: str, bound: float) -> None:
    assert error(build(solver, rtol=1e-8, atol=1e-10)) < bound


def test_pieces_gaps_and_starts_with_a_solver() -> None:
    """What the op does with states and flags, the loop around another solver does too, and differentiates."""
    mixer, (x, dt) = build("rk4", steps=3), material()
    x, dt = x.expand(3, 25, 2).clone(), dt.expand(3, 25)
    start, valid = torch.rand(3, 25) < 0.2, torch.rand(3, 25) < 0.7
    when = Timeline(dt, start, valid)
    with torch.no_grad():
        whole, final = mixer(x, None, when)
        first, state = mixer(x[:, :9], None, when.slice(0, 9))
        second, state = mixer(x[:, 9:], state, when.slice(9, 25))
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-14)
        torch.testing.assert_close(state.ssm, final.ssm, rtol=0, atol=1e-14)
        for b in range(3):
            for document in start[b].cumsum(0).unique():
                steps = (start[b].cumsum(0) == document) & valid[b]
                if steps.any():
                    alone = mixer(x[b : b + 1, steps], None, Timeline(dt[b : b + 1, steps]))[0]
                    torch.testing.assert_close(whole[b : b + 1, steps], alone, rtol=0, atol=1e-14)
        assert mixer(x[:, :0], final)[1].ssm.equal(final.ssm)
    x.requires_grad_()
    mixer(x, None, when)[0].square().sum().backward()
    assert mixer.log_tau.grad.abs().min() > 0 and not x.grad[~valid].any() and x.grad[valid].any()


def test_states_stay_between_rest_and_their_target() -> None:
    mixer = build(steps=1)
    with torch.no_grad():
        mixer.U.mul_(10)
        x, dt = 100 * torch.randn(4, 50, 2, dtype=torch.float64), 50 * torch.rand(4, 50, dtype=torch.float64)
        mixer.out_proj.weight.copy_(torch.eye(2, 5))
        y = mixer(x, None, Timeline(dt))[0] - mixer.out_proj.bias
    low, high = mixer.A.detach()[:2].clamp(max=0), mixer.A.detach()[:2].clamp(min=0)
    assert (y >= low).all() and (y <= high).all() and y.abs().max() > 0.5 * mixer.A[:2].abs().max()


def test_a_solver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    LTC(2)
    with pytest.raises(ModuleNotFoundError, match="torchdiffeq"):
        LTC(2, solver="rk4")


@pytest.mark.parametrize("options", [{"d_state": 0}, {"steps": 0}, {"dt": 0.0}, {"tau_max": 0.5}, {"rtol": 0.0}])
def test_options_that_make_no_sense(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LTC(2, **options)


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong literal first
def test_a_solver_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="Did you mean 'rk4"):
        LTC(2, solver="rk5")
