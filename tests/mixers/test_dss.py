"""DSS against its kernels as the formulas have them, against SciPy, and where sums vanish or kernels rise."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.signal import cont2discrete, dlsim

from longstate import DSS, Timeline
from longstate.mixers.dss import geometric_sum
from longstate.systems import legs_normal


def build(kernel: str, length: int | None = None, rising: bool = False) -> DSS:
    torch.manual_seed(4)
    mixer = DSS(2, 3, kernel, length, output="identity", dt_min=0.01, dt_max=0.3).double()
    with torch.no_grad():
        mixer.log_dt[:, 1] += 0.4  # the two Δ begin alike
        mixer.A_real += 0.3 * torch.randn(3)
        if rising:
            mixer.A_real[1:] = torch.tensor([0.2, 0.9])  # below where they are held
    return mixer


def parts(mixer: DSS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return λ ``[n]``, z ``[d n]`` and W ``[d n]`` by plain arithmetic."""
    real, imag, dt = (p.detach().numpy() for p in (mixer.A_real, mixer.A_imag, mixer.log_dt.exp()))
    real = -np.exp(real) if mixer.kernel == "exp" else real
    W = torch.view_as_complex(mixer.W.detach()).numpy()
    return real + 1j * imag, dt[:, :1] * real + 1j * dt[:, 1:] * imag, W


def kernel_of(mixer: DSS, count: int) -> np.ndarray:
    """Return the first taps as the paper writes them."""
    values, z, W = parts(mixer)
    exponents = z[..., None] * np.arange(count)
    if mixer.kernel == "exp":
        return np.einsum("dn,dnl->dl", W * (np.exp(z) - 1) / values, np.exp(exponents)).real
    assert mixer.length == count, "a row of the softmax is as long as the sequence"
    powers = np.exp(exponents - np.where(z.real > 0, exponents[..., -1], 0)[..., None])
    total = powers.sum(-1, keepdims=True)
    softmax = powers * total.conj() / (np.abs(total) ** 2 + 1e-7)
    return np.einsum("dn,dnl->dl", W / values, softmax).real


@pytest.mark.parametrize("length", [1, 30, 100])
@pytest.mark.parametrize(("kernel", "rising"), [("exp", False), ("softmax", False), ("softmax", True)])
def test_the_kernel_is_that_of_the_formula(kernel: str, rising: bool, length: int) -> None:
    mixer = build(kernel, length if kernel == "softmax" else None, rising)
    x = torch.randn(1, length, 2, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x)[0][0].numpy()
    taps, u, D = kernel_of(mixer, length), x[0].numpy(), mixer.D.detach().numpy()
    wanted = np.stack([np.convolve(taps[d], u[:, d])[:length] + D[d] * u[:, d] for d in range(2)], 1)
    assert np.abs(got - wanted).max() < 1e-10 * np.abs(wanted).max()


def test_exp_with_one_step_is_a_system_under_zero_order_hold() -> None:
    mixer = build("exp")
    mixer.log_dt.data[:, 1] = mixer.log_dt.data[:, 0]
    x = torch.randn(1, 90, 2, dtype=torch.float64)
    with torch.no_grad():
        got = (mixer(x)[0] - mixer.D * x)[0].numpy()
    values, z, W = parts(mixer)
    for d in range(2):
        # Each complex state as two real ones.
        A = np.kron(np.diag(values.real), np.eye(2)) + np.kron(np.diag(values.imag), [[0, -1], [1, 0]])
        B, C = np.kron(np.ones((3, 1)), [[1], [0]]), np.stack([W[d].real, -W[d].imag], 1).reshape(1, 6)
        A, B, *_ = cont2discrete((A, B, C, np.zeros((1, 1))), (z / values)[d, 0].real)
        _, y, _ = dlsim((A, B, C @ A, C @ B, 1.0), x[0, :, d].numpy())
        assert np.abs(got[:, d] - y[:, 0]).max() < 1e-10 * np.abs(y).max()


def test_exp_over_irregular_steps() -> None:
    mixer = build("exp")
    x, dt = torch.randn(1, 40, 2, dtype=torch.float64), 0.05 + 3 * torch.rand(1, 40, dtype=torch.float64)
    with torch.no_grad():
        got = (mixer(x, None, Timeline(dt))[0] - mixer.D * x)[0].numpy()
    values, z, W = parts(mixer)
    h, wanted = np.zeros((2, 3), complex), []
    for u, elapsed in zip(x[0].numpy(), dt[0].numpy(), strict=True):
        h = np.exp(elapsed * z) * h + (np.exp(elapsed * z) - 1) / values * u[:, None]
        wanted.append((W * h).sum(1).real)
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_a_geometric_sum_has_all_its_digits(length: int) -> None:
    z = [0, 1e-9, -1e-5 + 1e-6j, -0.3 + 1j, -2.5, 2j * math.pi + 1e-8, 2j * math.pi / max(length, 2), -1e-3 + 3j]
    got = geometric_sum(torch.tensor(z, dtype=torch.complex128)[None], length)[0].numpy()
    mpmath.mp.dps = 40
    for value, at in zip(got, z, strict=True):
        wanted = complex(mpmath.fsum(mpmath.exp(mpmath.mpc(at) * k) for k in range(length)))
        # What rounding the phases costs; the last sum but one vanishes.
        assert abs(value - wanted) < 1e-15 * length * max(1, abs(at) * length), at


def test_a_sum_that_vanishes_makes_no_infinity() -> None:
    mixer = build("softmax", 50)
    with torch.no_grad():
        mixer.A_real.zero_()
        turns = torch.arange(1, 4, dtype=torch.float64)
        mixer.A_imag.copy_(2 * math.pi / 50 * turns / mixer.log_dt[0, 1].exp())  # e^{50 z} = 1
    x = torch.randn(1, 50, 2, dtype=torch.float64)
    y, _ = mixer(x)
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())
    assert (y - mixer.D * x)[..., 0].abs().max() < 1e-3  # what remains is a rounding over ε


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_modes_that_rise_are_held_and_every_face_has_them(dtype: torch.dtype) -> None:
    mixer = build("softmax", 300, rising=True)
    mixer.A_real.data[2] = 40.0  # e^{40 Δ} a step
    rise = mixer.modes()[1].real * 299
    assert rise.max() <= 30 and (rise[:, 2] == 30).all() and (rise[:, 1] < 30).any()
    mixer = mixer.to(dtype)
    x = torch.randn(2, 300, 2, dtype=dtype)
    with torch.no_grad():
        whole, final = mixer(x)
        assert whole.isfinite().all()
        first, state = mixer(x[:, :40])
        pieces = [first]
        for i in range(40, 300):
            y, state = mixer(x[:, i : i + 1], state)
            pieces.append(y)
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    got = torch.cat(pieces, 1)
    assert (got - whole).abs().max() <= bound * whole.abs().max()
    assert (state.ssm - final.ssm).abs().max() <= bound * final.ssm.abs().max()
    # The oldest input of all weighs most: the last output hears it, the first ones do not.
    nudged = x.clone()
    nudged[:, 0] += 1
    with torch.no_grad():
        change = (mixer(nudged)[0] - whole).abs().amax((0, 2))
    assert change[299] > 10 * change[200] > 0


def test_initial_values() -> None:
    for kernel, length in (("exp", None), ("softmax", 9)):
        mixer = DSS(64, 32, kernel, length).double()
        mixer.reset_parameters()
        values, z, W = parts(mixer)
        wanted = np.linalg.eigvals(legs_normal(64)[0])
        np.testing.assert_allclose(np.sort(values.imag), np.sort(wanted.imag)[32:], rtol=1e-8)
        np.testing.assert_allclose(values.real, -0.5, rtol=1e-9)
        np.testing.assert_allclose(z, mixer.log_dt[:, :1].detach().exp().numpy() * values, rtol=1e-12)
        assert abs(np.mean(np.abs(W) ** 2) - 2) < 0.15  # standard normal, each part
        spread = mixer.log_dt.detach().exp().log10()
        assert abs(spread.mean().item() + 2) < 0.25 and spread.min() >= -3.0001 and spread.max() <= -0.9999


def test_no_step_of_an_optimiser_makes_exp_unstable_and_none_decays_it() -> None:
    mixer = DSS(3, 7)
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {"output.linear.weight", "output.linear.bias"}
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(4 * torch.randn_like(parameter))
    assert (mixer.modes()[1].real < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=64"),
        ({"kernel": "softmax"}, "length=1024"),
        ({"kernel": "softmax", "length": 0}, "length=1024"),
        ({"length": 100}, "Leave it out"),
        ({"kernel": "softmx"}, "softmax"),
        ({"output": "gate"}, "glu"),
        ({"dt_min": 0.5}, "dt_min"),
    ],
)
@pytest.mark.compiled  # apart from the run-time checks, which see a wrong literal first
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSS(3, **options)
