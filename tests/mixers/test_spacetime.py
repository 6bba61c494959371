"""SpaceTime against autoregressive processes, companion matrices in NumPy, and its closed loop run step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longstate import SpaceTime, Timeline
from longstate.systems import Companion


def doubled(**options: object) -> SpaceTime:
    return SpaceTime(**({"d_model": 3, "d_state": 5, "output": "identity"} | options)).double()  # type: ignore[arg-type]


def normalised(mixer: SpaceTime) -> np.ndarray:
    a = mixer.a.detach().numpy()
    return a / np.abs(a).sum(1, keepdims=True)


@pytest.mark.parametrize("phi", [[0.9], [1.4, -0.85], [0.3, 0.5, -0.2, 0.1, -0.4]])
def test_an_autoregressive_process_exactly(phi: list[float]) -> None:
    """Taps set by hand: every output is the next value, and the closed loop goes on with the process."""
    order = len(phi)
    series = np.random.default_rng(0).standard_normal((2, 60))
    for t in range(order, 60):
        series[:, t] = sum(phi[i] * series[:, t - 1 - i] for i in range(order))
    mixer = doubled(d_model=1, d_state=order, closed_loop=True)
    mixer.a.data.zero_()
    mixer.B.data = torch.eye(order, dtype=torch.float64)[:1]
    mixer.C.data = torch.tensor([phi], dtype=torch.float64)
    mixer.K.data = mixer.C.data.clone()
    u = torch.from_numpy(series)[..., None]
    y, state = mixer(u[:, :30])
    torch.testing.assert_close(y[:, order - 1 :], u[:, order:31], rtol=1e-11, atol=1e-12)
    outputs, inputs = mixer.forecast(state, 29)
    torch.testing.assert_close(inputs, u[:, 30:59], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs, u[:, 31:60], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 40, 300])
def test_the_kernel_of_a_companion_matrix(length: int) -> None:
    mixer = doubled()
    column, B, C = normalised(mixer), mixer.B.detach().numpy(), mixer.C.detach().numpy()
    impulse = torch.zeros(1, length, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    got = mixer(impulse)[0][0].detach().numpy()
    wanted = np.stack([Companion(column[i]).kernel(B[i], C[i], length) for i in range(3)], 1)
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    np.testing.assert_allclose(mixer.matrix()[1].detach(), Companion(column[1]).dense(), atol=1e-15)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_no_eigenvalue_leaves_the_unit_circle(size: float) -> None:
    mixer = doubled(d_model=100, d_state=16)
    mixer.a.data *= size
    radius = torch.linalg.eigvals(mixer.matrix()).abs().amax(1)
    assert radius.max() <= 1 + 1e-12 and radius.min() > 0.5


@pytest.mark.parametrize("kinds", [{}, {"differences": (1,)}, {"differences": (0, 3), "averages": (6,)}])
def test_the_closed_loop_is_the_open_one_fed_with_its_inputs(kinds: dict[str, tuple[int, ...]]) -> None:
    """With a column far from norm 1: another matrix in one of the two would show."""
    mixer = doubled(closed_loop=True, **kinds)
    mixer.a.data *= 7
    _, state = mixer(torch.randn(2, 20, 3, dtype=torch.float64))
    outputs, inputs = mixer.forecast(state, 12)
    for t in range(12):
        u = (state.ssm * mixer.K).sum(-1)[:, None]
        y, state = mixer(u, state)
        torch.testing.assert_close(inputs[:, t : t + 1], u, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outputs[:, t : t + 1], y, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad((outputs - 1).square().sum(), [mixer.a, mixer.B, mixer.C, mixer.K])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_the_closed_loop_by_powers() -> None:
    mixer = doubled(closed_loop=True)
    state = mixer(torch.randn(1, 9, 3, dtype=torch.float64))[1]
    outputs, _ = mixer.forecast(state, 70)
    B, C, K, h = (x.detach().numpy() for x in (mixer.B, mixer.C, mixer.K, state.ssm[0]))
    for i, column in enumerate(normalised(mixer)):
        loop = Companion(column).dense() + np.outer(B[i], K[i])
        for t in (0, 5, 69):
            wanted = C[i] @ np.linalg.matrix_power(loop, t + 1) @ h[i]
            assert abs(outputs[0, t, i].item() - wanted) < 1e-10 * max(1, abs(wanted))


def test_preprocessing() -> None:
    """Differences by NumPy, the rest beside a mean of the last steps; a line leaves no second difference."""
    mixer = doubled(d_model=6, d_state=1, differences=(0, 1, 2, 3), averages=(4,))
    mixer.a.data.zero_()
    mixer.B.data.fill_(1.0)
    mixer.C.data.fill_(1.0)
    u = torch.randn(1, 30, 6, dtype=torch.float64)
    y = mixer(u)[0][0].detach().numpy()
    series = u[0].numpy()
    for i in range(4):
        np.testing.assert_allclose(y[i:, i], np.diff(series[:, i], i), atol=1e-12)
    for t in range(3, 30):
        np.testing.assert_allclose(y[t, 4], series[t, 4] - series[t - 3 : t + 1, 4].mean(), atol=1e-12)
    np.testing.assert_allclose(y[:, 5], series[:, 5], atol=1e-12)  # the kinds begin anew
    line = torch.arange(30, dtype=torch.float64)[None, :, None].expand(1, 30, 6)
    assert mixer(line)[0][0, 3:, 2:4].abs().max() < 1e-12
    start = torch.arange(30)[None] == 15
    torch.testing.assert_close(mixer(u, None, Timeline(start=start))[0][:, 15:], mixer(u[:, 15:])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=0"),
        ({"differences": (4,)}, "differences"),
        ({"averages": (1,)}, "averages"),
        ({"differences": ()}, "differences"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpaceTime(4, **options)  # type: ignore[arg-type]


def test_no_forecast_without_a_closed_loop() -> None:
    mixer = SpaceTime(2, 3)
    with pytest.raises(ValueError, match="closed_loop=True"):
        mixer.forecast(mixer.initial_state(1), 4)
