"""S4 against SciPy, dense matrices and the systems' own kernels: taps, states, gradients, measures, narrow types."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from longstate import LSSL, S4, Timeline
from longstate.mixers._dplr import System, convolve, dense, responses
from longstate.mixers.s4 import MEASURES, SLOWEST, S4State
from longstate.ops import dplr_scan, state_space
from longstate.systems import MEASURES as SYSTEMS
from longstate.systems import nplr
from longstate.systems.structured import DPLR, Dense
from ops.test_against_reference import largest_error

CONFIGURATIONS = [("legs", True), ("legt", True), ("lagt", False), ("fout", True), ("mixed", False), ("legt", False)]
configurations = pytest.mark.parametrize(("measure", "tied"), CONFIGURATIONS)


def make(measure: str, tied: bool = True, n: int = 16, channels: int = 2, noise: float = 0.02) -> S4:
    mixer = S4(channels, n, measure, tied, output="identity").double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return mixer


def whole(mixer: S4, channel: int) -> tuple[DPLR, np.ndarray, np.ndarray, float]:
    """Return a channel's system with both modes of every pair, B, C and Δ."""
    poles, P, Q, B, C, dt = (x[channel].detach().numpy() for x in mixer.system().double())
    poles, P, Q, B, C = (np.concatenate([x, x.conj()]) for x in (poles, P, Q, B, C))
    return DPLR(poles, P, Q), B, C, float(dt)


@configurations
@pytest.mark.parametrize("length", [90, 2048])
def test_the_kernel_is_that_of_the_dense_matrix(measure: str, tied: bool, length: int) -> None:
    """Relative to the largest tap, by as many nodes as either type has; and that of a state is C Ā^{l+1} x."""
    mixer = make(measure, tied)
    initial = torch.randn(1, 2, 8, dtype=torch.complex128)
    wanted = []
    for channel in range(2):
        system, B, C, dt = whole(mixer, channel)
        sampled, drive = system.sampled(B, dt)
        x = initial[0, channel].numpy()
        first = sampled.apply(np.concatenate([x, x.conj()]))
        wanted.append([Dense(sampled.dense()).kernel(v, C, length).real for v in (drive, first)])
    exact = torch.from_numpy(np.stack(wanted, 1))
    scale = exact.abs().amax((1, 2), keepdim=True)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-9)):
        taps = responses(mixer.system(), length, dtype, initial)
        assert ((taps - exact).abs() / scale).max() < bound


@configurations
def test_the_dense_matrix_is_what_scipy_makes_of_the_system(measure: str, tied: bool) -> None:
    mixer = make(measure, tied)
    found = [x.detach().numpy() for x in dense(mixer.system())]
    identity = np.eye(8)
    modes = np.block([[identity, 1j * identity], [identity, -1j * identity]])  # from (Re x, Im x) to (x, x̄)
    for channel in range(2):
        system, B, C, dt = whole(mixer, channel)
        A, B, C = np.linalg.solve(modes, system.dense() @ modes).real, np.linalg.solve(modes, B).real, (C @ modes).real
        Ad, Bd, *_ = scipy.signal.cont2discrete((A, B[:, None], C[None], 0), dt, method="bilinear")
        np.testing.assert_allclose(found[0][channel], Ad, rtol=0, atol=1e-13)
        np.testing.assert_allclose(found[1][channel], Bd[:, 0], rtol=0, atol=1e-13 * np.abs(Bd).max())


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout"])
def test_it_starts_as_the_measure(measure: str) -> None:
    """As SciPy simulates the measure itself, in its own basis; where Re λ would be 0, but for what stands for 0."""
    n, length = 12, 200
    mixer = make(measure, n=n, channels=1, noise=0)
    A, B = SYSTEMS[measure].system(n)
    normal = mixer.system()
    found = whole(mixer, 0)[0].dense()
    shift = SLOWEST if (normal.poles.real + SLOWEST).abs().max() < 1e-6 else 0
    np.testing.assert_allclose(np.sort_complex(np.linalg.eigvals(found)).sum(), np.trace(A) - n * shift, rtol=1e-5)
    basis = nplr(measure, n).basis  # any row C of the measure's states is one of the modes
    row = np.random.default_rng(0).standard_normal(n)
    with torch.no_grad():
        mixer.C.copy_(torch.view_as_real(torch.from_numpy(row @ basis))[None])
        mixer.D.zero_()
    x = torch.randn(1, length, 1, dtype=torch.float64)
    system = (A - shift * np.eye(n), B[:, None], row[None], np.zeros((1, 1)))
    Ad, Bd, *_ = scipy.signal.cont2discrete(system, mixer.log_dt.exp().item(), method="bilinear")
    h, wanted = np.zeros(n), []
    for value in x[0, :, 0].numpy():
        h = Ad @ h + Bd[:, 0] * value
        wanted.append(row @ h)
    # The parameters were float32 when they were set.
    np.testing.assert_allclose(mixer(x)[0][0, :, 0].detach(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_mixed_measures_share_the_channels() -> None:
    mixer, legs, fout = (S4(3, 8, measure) for measure in ("mixed", "legs", "fout"))
    assert torch.equal(mixer.A_imag[:2], legs.A_imag[:2]) and torch.equal(mixer.A_imag[2:], fout.A_imag[2:])
    assert torch.equal(mixer.P[:2], legs.P[:2]) and torch.equal(mixer.P[2:], fout.P[2:])


def faces(system: System, u: torch.Tensor, initial: torch.Tensor) -> list[list[torch.Tensor]]:
    """Return outputs and final state of the convolution, the steps and the chunks, and their gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (*system, u, initial)]
    given, u, initial = System(*leaves[:6]), leaves[6], leaves[7]

    def in_chunks() -> tuple[torch.Tensor, torch.Tensor]:
        A, B = dense(given)
        C = torch.cat([2 * given.C.real, -2 * given.C.imag], -1)
        y, final = state_space(u, A, B, C, torch.cat([initial.real, initial.imag], -1))
        return y, torch.complex(*final.chunk(2, -1))

    def step_by_step() -> tuple[torch.Tensor, torch.Tensor]:
        return dplr_scan(u, given.dt.expand_as(u), *given[:-1], initial)

    results = []
    for face in (lambda: convolve(u, given, initial), step_by_step, in_chunks):
        y, final = face()
        total = y.sin().sum() + torch.view_as_real(final).cos().sum()
        results.append([y.detach(), final.detach(), *torch.autograd.grad(total, leaves)])
    return results


@configurations
@pytest.mark.parametrize("length", [64, 165])
def test_three_faces_and_their_gradients_are_one(measure: str, tied: bool, length: int) -> None:
    mixer = make(measure, tied, 8)
    u, initial = torch.randn(2, length, 2, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.complex128)
    convolved, stepped, chunked = faces(System(*(x.detach() for x in mixer.system())), u, initial)
    assert largest_error(convolved, stepped) < 1e-9  # of gradients; the contract holds outputs to 1e-10
    assert largest_error(convolved[:2], stepped[:2]) < 1e-11
    assert largest_error(chunked, stepped) < 1e-11


def test_float32_over_many_steps() -> None:
    """The kernel of 16,384 steps, against that of the same (rounded) system by another algorithm."""
    mixer, length = S4(2, 64, output="identity"), 16384
    taps = responses(mixer.system(), length, torch.float32)[0]
    for channel in range(2):
        system, B, C, dt = whole(mixer, channel)
        sampled, drive = system.sampled(B, dt)
        exact = Dense(sampled.dense()).kernel(drive, C, length).real
        np.testing.assert_allclose(taps[channel].detach(), exact, rtol=0, atol=2e-9 * np.abs(exact).max())


def test_a_long_sequence_in_float32_is_that_of_float64() -> None:
    mixer, x = S4(3, 16), torch.randn(1, 5000, 3)
    with torch.no_grad():
        y, state = mixer(x)
        exact, exact_state = mixer.double()(x.double())
    assert largest_error([y.double(), state.ssm.to(torch.complex128)], [exact, exact_state.ssm]) < 1e-5


@configurations
def test_a_system_that_is_sampled_as_time_passes(measure: str, tied: bool) -> None:
    """Every step of SciPy's matrices has a Δ of its own, from a state."""
    mixer, length = make(measure, tied, 8), 80
    x, elapsed = torch.randn(1, length, 2, dtype=torch.float64), 0.1 + 3 * torch.rand(1, length, dtype=torch.float64)
    initial = torch.randn(1, 2, 4, dtype=torch.complex128)
    y, state = mixer(x, S4State(initial), Timeline(dt=elapsed))
    for channel in range(2):
        system, B, C, dt = whole(mixer, channel)
        z = initial[0, channel].numpy()
        h, wanted, skip = np.concatenate([z, z.conj()]), [], mixer.D[channel].item()
        for value, time in zip(x[0, :, channel].numpy(), elapsed[0].numpy(), strict=True):
            Ad, Bd, *_ = scipy.signal.cont2discrete(
                (system.dense(), B[:, None], C[None], 0), dt * time, method="bilinear"
            )
            h = Ad @ h + Bd[:, 0] * value
            wanted.append((C @ h).real + skip * value)
        np.testing.assert_allclose(y[0, :, channel].detach(), wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())
        np.testing.assert_allclose(state.ssm[0, channel].detach(), h[:4], rtol=0, atol=1e-11 * np.abs(h).max())


def test_tied_systems_stay_stable() -> None:
    """Whatever the parameters are: A + A* is negative definite."""
    for measure in MEASURES:
        mixer = make(measure, noise=1.0)
        for channel in range(2):
            assert np.linalg.eigvals(whole(mixer, channel)[0].dense()).real.max() < 0


@pytest.mark.parametrize("make_one", [S4, LSSL])
@pytest.mark.parametrize("kind", ["long", "short", "start", "dt"])
def test_autocast_rounds_no_state(make_one: type[S4] | type[LSSL], kind: str) -> None:
    mixer, length = make_one(3, 8, output="identity"), 5 if kind == "short" else 70
    x = torch.randn(2, length, 3, requires_grad=True)
    timeline = {
        "start": Timeline(start=torch.rand(2, length) < 0.1),
        "dt": Timeline(dt=torch.rand(2, length)),
    }.get(kind)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, state = mixer(x, None, timeline)
            (gradient,) = torch.autograd.grad(y.sin().sum() + state.ssm.abs().sum(), x)
        results.append([y, state.ssm, gradient])
    assert largest_error(results[1][:2], results[0][:2]) == 0
    # What torch itself multiplies on the way back may be rounded: of backward passes, autocast is to be left out.
    assert largest_error(results[1][2:], results[0][2:]) < 0.03


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"d_state=7.*Try d_state=8"):
        S4(4, 7)
    with pytest.raises(ValueError, match="measure"):
        S4(4, measure="hippo")
    with pytest.raises(ValueError, match="dt_min"):
        S4(4, dt_min=0.0)
