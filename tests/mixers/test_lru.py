"""LRU as the discrete linear system it says it is, by SciPy and by its kernel; its initial values; its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import dlsim

from longstate import LRU


def complex_(x: torch.Tensor) -> np.ndarray:
    return torch.view_as_complex(x.detach().double()).numpy()


def system(mixer: LRU) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return λ, γB, C and D."""
    nu, theta, gamma = (p.detach().double().exp().numpy() for p in (mixer.nu_log, mixer.theta_log, mixer.gamma_log))
    return np.exp(-nu + 1j * theta), gamma[:, None] * complex_(mixer.B), complex_(mixer.C), mixer.D.detach().numpy()


@pytest.mark.parametrize("length", [1, 90])
def test_a_simulation_by_scipy_and_a_convolution(length: int) -> None:
    mixer = LRU(2, 5, max_phase=1.0, output="identity").double()
    x = torch.randn(1, length, 2, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x)[0][0].numpy()
    decay, B, C, D = system(mixer)
    # Each complex state as two real ones.
    A = np.kron(np.diag(decay.real), np.eye(2)) + np.kron(np.diag(decay.imag), [[0, -1], [1, 0]])
    B_real = np.stack([B.real, B.imag], 1).reshape(10, 2)
    C_real = np.stack([C.real, -C.imag], 2).reshape(2, 10)
    _, y, _ = dlsim((A, B_real, C_real @ A, C_real @ B_real + np.diag(D), 1.0), x[0].numpy())
    assert np.abs(got - y).max() < 1e-10 * np.abs(y).max()
    kernel = np.einsum("dn,ln,ne->lde", C, decay ** np.arange(length)[:, None], B).real
    convolved = sum(
        np.einsum("de,te->td", kernel[lag], np.roll(x[0].numpy(), lag, 0)) * (np.arange(length) >= lag)[:, None]
        for lag in range(length)
    )
    wanted = convolved + D * x[0].numpy()
    assert np.abs(got - wanted).max() < 1e-10 * np.abs(wanted).max()


def test_modes_are_drawn_uniformly_over_the_ring_and_normalised() -> None:
    mixer = LRU(8, 20_000, 0.5, 0.9, max_phase=math.pi).double()
    mixer.reset_parameters()
    decay, _, C, _ = system(mixer)
    area = (np.abs(decay) ** 2 - 0.25) / (0.81 - 0.25)
    phase = np.angle(decay) / math.pi
    for drawn in (area, phase):
        assert drawn.min() > -1e-12 and drawn.max() < 1 + 1e-12
        # Kolmogorov's distance from the uniform distribution; 1.95/√n is passed once in a thousand.
        assert np.abs(np.sort(drawn) - (np.arange(20_000) + 0.5) / 20_000).max() < 1.95 / math.sqrt(20_000)
    np.testing.assert_allclose(mixer.gamma_log.detach().exp().numpy(), np.sqrt(1 - np.abs(decay) ** 2), rtol=1e-12)
    assert abs(np.mean(np.abs(complex_(mixer.B)) ** 2) * 8 - 1) < 0.02
    assert abs(np.mean(np.abs(C) ** 2) * 20_000 - 2) < 0.02


def test_no_step_of_an_optimiser_makes_it_unstable_and_none_decays_it() -> None:
    mixer = LRU(3, 7)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(4 * torch.randn_like(parameter))
    assert (np.abs(system(mixer)[0]) < 1).all()
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {"output.linear.weight", "output.linear.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state"),
        ({"r_min": 0.9, "r_max": 1.0}, "r_max < 1"),
        ({"r_min": 0.99, "r_max": 0.9}, "r_min"),
        ({"max_phase": 7.0}, "2π"),
        ({"output": "gate"}, "glu"),
    ],
)
@pytest.mark.compiled  # apart from the run-time checks, which see a wrong literal first
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRU(3, **options)
