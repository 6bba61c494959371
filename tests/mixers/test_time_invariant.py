"""S4D and S5 as the linear systems they say they are, by SciPy and by matrix exponentials; and their initial values."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.signal import cont2discrete, dlsim

from longstate import S4D, S5, Mixer, Timeline
from longstate.mixers._modes import PARAMETERIZATIONS, real_part
from longstate.systems import legs, legs_normal, perturbed_legs

CASES = [
    *(("s4d", kind, rule) for kind in ("legs", "lin", "inv", "quad", "real") for rule in ("zoh", "bilinear")),
    *(("s4d", kind, "zoh") for kind in ("dfout", "ptd")),
    *(("s5", kind, rule) for kind in (1, 2) for rule in ("zoh", "bilinear")),
]


def build(name: str, kind: str | int, rule: str) -> Mixer:
    torch.manual_seed(4)
    if name == "s4d":
        return S4D(2, 6, kind, rule, output="identity", dt_min=0.01, dt_max=0.3).double()
    return S5(2, 8, kind, rule, output="identity", dt_min=0.01, dt_max=0.3).double()


def complex_(x: torch.Tensor) -> np.ndarray:
    return torch.view_as_complex(x.detach()).numpy()


def channels(mixer: Mixer) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, slice]]:
    """Return dense real systems (A Δ, B Δ, C, D), in nominal steps, and the channels that each of them serves.

    A mode λ of a conjugate pair is a 2×2 block [[Re, −Im], [Im, Re]], whose output is 2 Re(C h).
    """
    a = real_part(mixer.A_real.detach(), mixer.parameterization).numpy()
    dt, D = mixer.log_dt.detach().exp().numpy(), mixer.D.detach().numpy()
    if isinstance(mixer, S4D):
        result = []
        for i in range(mixer.d_model):
            if mixer.real:
                A, B, C = np.diag(a[i]), mixer.B.detach().numpy()[i][:, None], mixer.C.detach().numpy()[i][None]
            else:
                eigenvalues = a[i] + 1j * mixer.A_imag.detach().numpy()[i]
                A, B, C = realified(eigenvalues, complex_(mixer.B)[i][:, None], complex_(mixer.C)[i][None])
            result.append((A * dt[i], B * dt[i], C, D[i : i + 1, None], slice(i, i + 1)))
        return result
    A, B, C = realified(a + 1j * mixer.A_imag.detach().numpy(), complex_(mixer.B), complex_(mixer.C))
    each = np.repeat(dt, 2)[:, None]
    return [(A * each, B * each, C, np.diag(D), slice(None))]


def realified(eigenvalues: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(eigenvalues)
    A = np.zeros((2 * n, 2 * n))
    for i, value in enumerate(eigenvalues):
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[value.real, -value.imag], [value.imag, value.real]]
    stacked = np.stack([B.real, B.imag], 1).reshape(2 * n, -1)
    return A, stacked, 2 * np.stack([C.real, -C.imag], 2).reshape(len(C), 2 * n)


@pytest.mark.parametrize("length", [1, 20, 100])
@pytest.mark.parametrize(("name", "kind", "rule"), CASES)
def test_a_simulation_by_scipy(name: str, kind: str | int, rule: str, length: int) -> None:
    mixer = build(name, kind, rule)
    x = torch.randn(1, length, 2, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x)[0][0].numpy()
    wanted = np.zeros_like(got)
    for A, B, C, D, at in channels(mixer):
        # SciPy's bilinear rule folds the state's own step into C and D, so only its A and B are taken.
        discrete_A, discrete_B, *_ = cont2discrete((A, B, C, D), 1.0, rule)
        # Here y_t reads h_t; there it reads the state before the input: y = C Ā h + (C B̄ + D) u.
        _, y, _ = dlsim((discrete_A, discrete_B, C @ discrete_A, C @ discrete_B + D, 1.0), x[0, :, at].numpy())
        wanted[:, at] = y
    assert np.abs(got - wanted).max() < 1e-10 * np.abs(wanted).max()


def test_steps_that_turn_real_modes_negative() -> None:
    """The bilinear rule's (1 + ΔA/2)/(1 − ΔA/2) is below 0 from Δ |A| = 2 on, and has no real logarithm."""
    mixer = S4D(2, 6, "real", "bilinear", output="identity", dt_min=1.0, dt_max=2.0).double()
    x = torch.randn(1, 100, 2, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x)[0][0].numpy()
    for A, B, C, D, at in channels(mixer):
        h = np.zeros(6)
        for t, u in enumerate(x[0, :, at].numpy()):
            h = np.linalg.solve(np.eye(6) - A / 2, (np.eye(6) + A / 2) @ h + B @ u)
            assert np.abs(C @ h + D @ u - got[t, at]).max() < 1e-10


@pytest.mark.parametrize(("name", "kind", "rule"), CASES)
def test_irregular_steps_by_matrix_exponentials(name: str, kind: str | int, rule: str) -> None:
    mixer = build(name, kind, rule)
    x, dt = torch.randn(1, 80, 2, dtype=torch.float64), 0.05 + 3 * torch.rand(1, 80, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x, None, Timeline(dt))[0][0].numpy()
    wanted = np.zeros_like(got)
    for A, B, C, D, at in channels(mixer):
        n = len(A)
        h, u = np.zeros(n), x[0, :, at].numpy()
        for t, elapsed in enumerate(dt[0].numpy()):
            if rule == "zoh":  # d/dt (h, u) = [[A, B], [0, 0]] (h, u) over the elapsed time
                block = np.zeros((n + B.shape[1], n + B.shape[1]))
                block[:n, :n], block[:n, n:] = A, B
                h = (expm(elapsed * block) @ np.concatenate([h, u[t]]))[:n]
            else:
                half = elapsed / 2 * A
                h = np.linalg.solve(np.eye(n) - half, (np.eye(n) + half) @ h + elapsed * B @ u[t])
            wanted[t, at] = C @ h + D @ u[t]
    assert np.abs(got - wanted).max() < 1e-10 * np.abs(wanted).max()


def modes(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    mixer = S4D(3, n, kind).double()
    mixer.reset_parameters()  # in float64
    A, B, _, dt = mixer.system()
    assert torch.equal(A, A[:1].expand_as(A)), "every channel begins alike"
    assert ((dt >= 1e-3 * (1 - 1e-9)) & (dt <= 0.1 * (1 + 1e-9))).all()
    return A[0].detach().numpy(), B[0].detach().numpy()


@pytest.mark.parametrize("N", [2, 8, 64])
def test_initial_values(N: int) -> None:
    n = np.arange(N // 2)
    closed = {
        "lin": -0.5 + 1j * math.pi * n,
        "inv": -0.5 + 1j * N / math.pi * (N / (2 * n + 1) - 1),
        "quad": -0.5 + 1j * (1 + 2 * n) ** 2 / math.pi,
    }
    for kind, wanted in closed.items():
        A, B = modes(kind, N)
        np.testing.assert_allclose(A, wanted, rtol=1e-12)
        np.testing.assert_allclose(B, 1)
    A, B = modes("legs", N)
    eigenvalues = np.linalg.eigvals(legs_normal(N)[0])
    np.testing.assert_allclose(np.sort(A.imag), np.sort(eigenvalues.imag)[N // 2 :], rtol=1e-8)
    np.testing.assert_allclose(A.real, -0.5, rtol=1e-8)
    assert np.abs(B.real).max() <= 2 and np.abs(B.imag).max() <= 2
    A, B = modes("real", N)
    np.testing.assert_allclose(A, -np.arange(1, N + 1))
    np.testing.assert_allclose(B, 1)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("N", [2, 8, 64])
def test_dfout_starts_with_poles_on_circles(N: int, rule: str) -> None:
    mixer = S4D(5, N, "dfout", rule).double()
    mixer.reset_parameters()
    A, B, _, dt = (x.detach().numpy() for x in mixer.system())
    z = A * dt[:, None]
    poles = np.exp(z) if rule == "zoh" else (1 + z / 2) / (1 - z / 2)
    np.testing.assert_allclose(np.abs(poles), np.exp(-dt / 2)[:, None].repeat(N // 2, 1), rtol=1e-9)
    phase = np.angle(poles)
    np.testing.assert_allclose(np.diff(phase, axis=1), 2 * math.pi / N, rtol=1e-9)
    # Those of all channels together fill half the circle, and their conjugates the other one.
    np.testing.assert_allclose(np.sort(phase.ravel()), 2 * math.pi * np.arange(5 * N // 2) / (5 * N), atol=1e-9)
    np.testing.assert_allclose(B, 1)


@pytest.mark.parametrize("N", [2, 8, 64])
def test_ptd_starts_as_legs_itself_but_for_what_was_perturbed(N: int) -> None:
    A, B = modes("ptd", N)
    s = np.array([0.1j, 3j, 1 + 2j])
    C = np.random.default_rng(0).normal(size=N)
    system = perturbed_legs(N)
    np.testing.assert_allclose(A, system.eigenvalues, rtol=1e-12)
    read = C @ system.basis
    got = [(read * B / (at - A)).sum() + (read.conj() * B.conj() / (at - A.conj())).sum() for at in s]
    dense, b = legs(N)
    wanted = [C @ np.linalg.solve(at * np.eye(N) - dense - system.perturbation, 0.9 * b) for at in s]
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.parametrize("make", [lambda p: S4D(3, 8, parameterization=p), lambda p: S5(3, 8, 2, parameterization=p)])
def test_every_parameterization_starts_at_the_same_system_and_but_one_keeps_it_stable(make: Any) -> None:
    functions = {
        "exp": lambda w: -np.exp(w),
        "softplus": lambda w: -np.log1p(np.exp(w)),
        "direct": lambda w: w,
        "stable": lambda w: -1 / (w**2 + 0.1),
    }
    assert set(functions) == set(PARAMETERIZATIONS)
    x, outputs, unstable = torch.randn(1, 30, 3, dtype=torch.float64), [], set()
    for name, function in functions.items():
        torch.manual_seed(3)
        mixer = make(name).double()
        torch.manual_seed(3)
        mixer.reset_parameters()
        np.testing.assert_allclose(function(mixer.A_real.detach().numpy()), -0.5, rtol=1e-12)
        outputs.append(mixer(x)[0].detach().numpy())
        with torch.no_grad():
            mixer.A_real.copy_(3 * torch.randn_like(mixer.A_real))  # where no optimiser was told to stop
        values = function(mixer.A_real.detach().numpy())
        if (values >= 0).any():
            unstable.add(name)
        written_out = make("direct").double()
        written_out.load_state_dict(mixer.state_dict() | {"A_real": torch.from_numpy(values)})
        np.testing.assert_allclose(mixer(x)[0].detach(), written_out(x)[0].detach(), rtol=1e-9)
    assert unstable == {"direct"}
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", [S4D(3, 8), S4D(3, 5, "real"), S5(3, 8)], ids=["s4d", "s4d real", "s5"])
def test_weight_decay_is_for_the_gate_alone(mixer: Mixer) -> None:
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {"output.linear.weight", "output.linear.bias"}


def test_the_spread_of_what_is_drawn() -> None:
    mixer = S4D(64, 64)
    C = torch.view_as_complex(mixer.C)
    assert abs(C.abs().square().mean().item() - 1) < 0.1
    spread = mixer.log_dt.exp().log10()
    assert abs(spread.mean().item() + 2) < 0.25 and spread.min() < -2.7 and spread.max() > -1.3
    s5 = S5(32, 64)
    assert abs(torch.view_as_complex(s5.B).abs().square().mean().item() * 32 - 1) < 0.3


def test_the_initial_s5_is_its_dense_system() -> None:
    """Without the change of basis, the same: modes are those of blocks of the normal part of LegS."""
    mixer = S5(3, 16, n_blocks=2).double()
    mixer.reset_parameters()
    wanted = np.sort(np.linalg.eigvals(legs_normal(8)[0]).imag)[4:]
    np.testing.assert_allclose(
        np.sort(mixer.A_imag.detach().numpy().reshape(2, 4), 1), np.stack([wanted] * 2), rtol=1e-8
    )


@pytest.mark.parametrize("initialization", ["legs", "ptd"])
def test_a_change_of_basis_leaves_the_initial_s5_as_it_was_drawn(initialization: Any) -> None:
    """Its transfer function is that of the dense real blocks, with the B and C that a normal distribution gave."""
    mixer = S5(3, 16, 2, initialization=initialization).double()
    torch.manual_seed(7)
    mixer.reset_parameters()
    torch.manual_seed(7)
    B = (torch.randn(2, 8, 3, dtype=torch.float64) / 3**0.5).numpy()
    C = (torch.randn(3, 2, 8, dtype=torch.float64) / 16**0.5).numpy()
    block = legs_normal(8)[0] if initialization == "legs" else legs(8)[0] + perturbed_legs(8).perturbation
    values = real_part(mixer.A_real.detach(), "exp").numpy() + 1j * mixer.A_imag.detach().numpy()
    for s in (0.3j, 5j, 1 - 2j):
        got = complex_(mixer.C) / (s - values) @ complex_(mixer.B)
        got = got + complex_(mixer.C).conj() / (s - values.conj()) @ complex_(mixer.B).conj()
        wanted = sum(C[:, i] @ np.linalg.solve(s * np.eye(8) - block, B[i]) for i in range(2))
        np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S4D(4, 7), "d_state=8"),
        (lambda: S4D(4, 0, "real"), "d_state"),
        (lambda: S4D(4, 8, "leg"), "legs"),
        (lambda: S4D(4, 8, discretization="tustin"), "bilinear"),
        (lambda: S4D(4, 8, parameterization="log"), "exp"),
        (lambda: S4D(4, 12, "real", parameterization="stable"), "softplus"),
        (lambda: S4D(4, 8, output="none"), "identity"),
        (lambda: S4D(4, 8, dt_min=0.2), "dt_min"),
        (lambda: S5(4, 7), "d_state"),
        (lambda: S5(4, 12, n_blocks=4), "n_blocks=4"),
        (lambda: S5(4, 8, discretization="zho"), "zoh"),
        (lambda: S5(4, 8, dt_min=0.0), "dt_min"),
        (lambda: S5(4, 8, initialization="lgs"), "legs"),
        (lambda: S4D(4, 9, "dfout"), "d_state=10"),
        (lambda: S4D(4, 9, "ptd"), "d_state=10"),
        (lambda: S4D(4, 64, "ptd", parameterization="stable"), "softplus"),
    ],
)
@pytest.mark.compiled  # apart from the run-time checks, which see a wrong literal first
def test_options_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_so_long_that_real_modes_change_sign() -> None:
    """By the bilinear rule Ā is negative beyond Δ A = −2, and 0 there; its logarithm is no real number."""
    mixer = S4D(3, 5, "real", "bilinear", parameterization="direct", output="identity").double()
    with torch.no_grad():
        mixer.log_dt.copy_(torch.tensor([0.0, 0.3, 2.0]))
    x, state = (
        torch.randn(2, 90, 3, dtype=torch.float64),
        mixer.initial_state(2)._replace(ssm=torch.randn(2, 3, 5, dtype=torch.float64)),
    )
    with torch.no_grad():
        y, final = mixer(x, state)
        scanned, last = mixer(x, state, Timeline(valid=torch.ones(2, 90, dtype=torch.bool)))
    torch.testing.assert_close(y, scanned, rtol=0, atol=1e-12)
    torch.testing.assert_close(final, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["lin", "real"])
def test_a_bilinear_kernel_has_the_digits_of_its_parameters(kind: str) -> None:
    mixer = S4D(1, 8, kind, "bilinear", output="identity").double()
    with torch.no_grad():
        mixer.D.zero_()
        mixer.log_dt.fill_(math.log(1e-3))
        taps = mixer(torch.eye(1, 2000, dtype=torch.float64)[..., None])[0][0, ::50, 0]
        A, B, C, dt = (x[0].tolist() for x in mixer.system())
    with mpmath.workdps(50):
        # From A and Δ as the layer computes them.
        z = [mpmath.mpc(a) * mpmath.mpf(dt) for a in A]
        decays = [(1 + x / 2) / (1 - x / 2) for x in z]
        weights = [
            mpmath.mpc(b) * mpmath.mpc(c) * mpmath.mpf(dt) / (1 - x / 2) for b, c, x in zip(B, C, z, strict=True)
        ]
        scale = 1 if kind == "real" else 2
        exact = [
            scale * mpmath.fsum(w * a**tap for w, a in zip(weights, decays, strict=True)).real
            for tap in range(0, 2000, 50)
        ]
        errors = [abs(mpmath.mpf(got) - wanted) for got, wanted in zip(taps.tolist(), exact, strict=True)]
        assert all(error <= 2e-14 * max(abs(x) for x in exact) for error in errors)


def test_real_modes_may_be_odd_in_number() -> None:
    assert S4D(4, 7, "real").initial_state(2).ssm.shape == (2, 4, 7)
