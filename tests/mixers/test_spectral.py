"""STU: its filters against many-digit arithmetic, its sums written out, and systems that it approximates."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch

from longstate import STU, Timeline
from longstate.mixers.spectral import spectral_filters


def hankel(length: int) -> np.ndarray:
    s = np.add.outer(np.arange(1, length + 1), np.arange(1, length + 1)).astype(float)
    return 2 / (s**3 - s)


def test_filters_against_many_digits() -> None:
    """Also those that double precision does not see in the matrix itself: σ of 1e-20 of the largest."""
    length = 18
    with mpmath.workdps(60):
        Z = mpmath.matrix(length, length)
        for i in range(length):
            for j in range(length):
                Z[i, j] = mpmath.mpf(2) / ((i + j + 2) ** 3 - (i + j + 2))
        values, vectors = mpmath.eigsy(Z)
        wanted = np.array([[float(vectors[i, j]) for i in range(length)] for j in range(length)])[::-1]
        exact = np.array([float(value) for value in values])[::-1]
    sigma, phi = spectral_filters(length, 17)
    assert sigma[-1] < 1e-19 * sigma[0]
    np.testing.assert_allclose(sigma, exact[:17], rtol=1e-6)
    np.testing.assert_allclose(sigma[:9], exact[:9], rtol=1e-12)
    overlap = (phi * wanted[:17]).sum(1, keepdims=True)
    np.testing.assert_allclose(phi, wanted[:17] * np.sign(overlap), atol=1e-7)
    np.testing.assert_allclose(phi[:9], (wanted[:17] * np.sign(overlap))[:9], atol=1e-12)
    assert (np.take_along_axis(phi, np.abs(phi).argmax(1)[:, None], 1) > 0).all()


@pytest.mark.parametrize("length", [1, 2, 40, 256, 1500])
def test_filters_are_those_of_the_matrix(length: int) -> None:
    count = min(length, 12)
    sigma, phi = spectral_filters(length, count)
    np.testing.assert_allclose(phi @ phi.T, np.eye(count), atol=1e-12)
    np.testing.assert_allclose(hankel(length) @ phi.T, phi.T * sigma, atol=1e-14)
    assert (np.diff(sigma) < 0).all()


def test_more_filters_than_there_are() -> None:
    """At 256 taps, 20 would be left of the matrix itself; 24 and some more are there."""
    assert spectral_filters(256, 24)[1].shape == (24, 256)
    assert (np.linalg.eigvalsh(hankel(256)) > 1e-16 * 0.36).sum() < 24
    with pytest.raises(ValueError, match=r"STU\(length=64, n_filters=40\).* Try n_filters=2\d"):
        STU(2, 64, 40)


@pytest.mark.parametrize(("k_u", "k_y"), [(3, 2), (1, 1), (16, 3)])
def test_sums_written_out(k_u: int, k_y: int) -> None:
    width, length, count, steps = 2, 9, 3, 40
    mixer = STU(width, length, count, k_u, k_y, output="identity").double()
    for parameter in (mixer.M_phi, mixer.M_y):
        parameter.data += 0.1 * torch.randn_like(parameter)
    M_u, M_y, M_phi = (p.detach().numpy() for p in (mixer.M_u, mixer.M_y, mixer.M_phi))
    sigma, phi = spectral_filters(length, count)
    u = np.random.default_rng(0).standard_normal((steps, width))
    wanted = np.zeros((steps, width))
    for t in range(steps):
        y = sum((M_y[i] @ wanted[t - 1 - i] for i in range(k_y) if t - 1 - i >= 0), np.zeros(width))
        y = y + sum(M_u[i] @ u[t - i] for i in range(k_u) if t - i >= 0)
        for k in range(count):
            plus, minus = np.zeros(width), np.zeros(width)
            for i in range(length):
                if t - 2 - i >= 0:
                    plus += phi[k, i] * u[t - 2 - i]
                    minus += (-1) ** i * phi[k, i] * u[t - 2 - i]
            y = y + sigma[k] ** 0.25 * (M_phi[k] @ plus + M_phi[count + k] @ minus)
        wanted[t] = y
    got = mixer(torch.from_numpy(u)[None])[0][0].detach().numpy()
    assert np.abs(got - wanted).max() < 1e-12 * np.abs(wanted).max()


@pytest.mark.parametrize("steps", [1, 5, 9, 150])
def test_every_way_to_the_features(steps: int) -> None:
    """By products, in the frequencies, with steps brought together, and by the op: from any state the same."""
    mixer = STU(3, 70, 5, output="identity").double()
    mixer.M_phi.data.normal_()
    _, state = mixer(torch.randn(2, 20, 3, dtype=torch.float64))
    x, flags = torch.randn(2, steps, 3, dtype=torch.float64), torch.zeros(2, steps, dtype=torch.bool)
    wanted = torch.cat(one_by_one(mixer, x, state), 1)
    whole, final = mixer(x, state)
    for timeline in (None, Timeline(start=flags), Timeline(valid=~flags), Timeline(start=flags, valid=~flags)):
        y, after = mixer(x, state, timeline)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after, final, rtol=1e-10, atol=1e-10)
    assert whole.std() > 0.1


def one_by_one(mixer: STU, x: torch.Tensor, state: object) -> list[torch.Tensor]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = mixer(x[:, t : t + 1], state)
        outputs.append(y)
    return outputs


def test_systems_that_hardly_forget() -> None:
    """Least squares on the kernel: the outputs come ten times nearer for every four filters, down to 1e-9.

    Eigenvalues go up to 0.9999 in size, of either sign.
    """
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length, width, states = 256, 2, 12
    size = torch.tensor([0.9999, 0.999, 0.99, 0.97, 0.9, 0.5], dtype=torch.float64)
    eigenvalues, Q = torch.cat([size, -size]), torch.linalg.qr(normal(states, states))[0]
    A, B, C = Q @ torch.diag(eigenvalues) @ Q.T, normal(states, width), normal(width, states)
    u, h, outputs, taps = normal(1, length, width), torch.zeros(states, dtype=torch.float64), [], [C @ B]
    for t in range(length):
        h = A @ h + B @ u[0, t]
        outputs.append(C @ h)
        taps.append(C @ torch.linalg.matrix_power(A, t + 1) @ B)
    wanted, kernel = torch.stack(outputs), torch.stack(taps[:length])
    # y_t − y_{t−2} = C B u_t + C A B u_{t−1} + Σ_i C (A² − 1) A^i B u_{t−2−i}
    rest = (kernel[2:] - kernel[:-2]).flatten(1)
    errors = []
    for count in (4, 8, 12, 16, 20, 24):
        mixer = STU(width, length, count, alpha=1.0, output="identity").double()
        bank = mixer.taps[3:, 2:length].T
        scale = bank.norm(dim=0)
        found = torch.linalg.lstsq(bank / scale, rest, rcond=1e-14, driver="gelsd").solution / scale[:, None]
        mixer.M_phi.data = found.view(2 * count, width, width)
        mixer.M_u.data = torch.stack([kernel[0], kernel[1], torch.zeros_like(kernel[0])])
        errors.append(((mixer(u)[0][0] - wanted).norm() / wanted.norm()).item())
    assert errors[0] > 0.1 and errors[-1] < 2e-9
    assert all(after < 0.1 * before for before, after in itertools.pairwise(errors))


def test_filters_keep_their_digits_in_any_type() -> None:
    mixer = STU(2, 300, 20).bfloat16()
    assert mixer.taps.dtype == torch.float64
    assert torch.equal(mixer.double().taps, STU(2, 300, 20).taps)
    assert not any("taps" in name for name in mixer.state_dict())


@pytest.mark.parametrize("options", [{"k_u": 0}, {"k_y": 0}, {"alpha": 1.5}, {"length": 0}, {"n_filters": 0}])
def test_options_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        STU(4, **options)
