"""Steps by Woodbury's identity against SciPy, the dense op and the reference."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from longstate import ops
from longstate.systems import MEASURES, generalised_bilinear, nplr
from ops.test_against_reference import largest_error
from poison import poisoned_memory

N = 8


def modes(measure: str, dtype: torch.dtype = torch.complex128) -> dict[str, torch.Tensor]:
    """Return a measure's system in the eigenbasis of its normal part, for one channel."""
    found = nplr(measure, N)
    poles, P, B = (torch.from_numpy(x)[None].to(dtype) for x in (found.eigenvalues, found.P, found.B))
    return dict(poles=poles, P=P, Q=P, B=B)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("measure", ["legs", "legt", "fout", "lagt"])
def test_it_is_what_scipy_discretises(measure: str, alpha: float) -> None:
    """With other steps than the ones before: each of SciPy's matrices is used for one step."""
    A, B = MEASURES[measure].system(N)
    scale, found = MEASURES[measure].scale(N), nplr(measure, N)
    rng = np.random.default_rng(1)
    C, u, dt = rng.standard_normal(N), rng.standard_normal(12), 0.02 + 0.05 * rng.random(12)
    given = modes(measure) | dict(C=torch.from_numpy(C @ found.basis)[None], alpha=alpha)
    y, final = ops.dplr_scan(torch.from_numpy(u)[None, :, None], torch.from_numpy(dt)[None, :, None], **given)
    x, wanted = np.zeros(N), []
    for step, value in zip(dt, u, strict=True):
        Ad, Bd, *_ = scipy.signal.cont2discrete((A, B[:, None], C[None], 0), step, method="gbt", alpha=alpha)
        x = Ad @ x + Bd[:, 0] * value
        wanted.append(C @ x)
    np.testing.assert_allclose(y[0, :, 0], wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    state = 2 * (found.basis @ final[0, 0].numpy()).real
    np.testing.assert_allclose(state, x, rtol=0, atol=1e-12 * np.abs(x).max() * scale.max() / scale.min())


def test_a_dense_matrix_is_its_own_low_rank() -> None:
    A, B = MEASURES["legs"].system(N)
    Ad, Bd = (torch.from_numpy(x)[None] for x in generalised_bilinear(A, B, 0.03, 0.6))
    A, B = torch.from_numpy(A)[None], torch.from_numpy(B)[None]
    C, initial = torch.randn(1, N, dtype=torch.float64), torch.randn(2, 1, N, dtype=torch.float64)
    u = torch.randn(2, 40, 1, dtype=torch.float64)
    identity, poles = torch.eye(N, dtype=torch.float64)[None], torch.zeros(1, N, dtype=torch.float64)
    got = ops.dplr_scan(u, torch.full_like(u, 0.03), poles, identity, -A.mT, B, C, initial, alpha=0.6)
    assert largest_error(list(got), list(ops.state_space(u, Ad, Bd, C, initial))) < 1e-12


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_float32_errs_by_its_roundings(measure: str) -> None:
    """Arguments are rounded first; the state is a few hundred roundings old at most."""
    given = modes(measure, torch.complex64) | dict(C=torch.randn(1, N // 2, dtype=torch.complex64))
    u, dt = torch.randn(2, 500, 1), 0.05 * torch.rand(2, 500, 1)
    got = ops.dplr_scan(u, dt, **given)
    exact = ops.dplr_scan(u.double(), dt.double(), **{k: x.to(torch.complex128) for k, x in given.items()})
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.complex64
    assert largest_error([got[0].double(), got[1].to(torch.complex128)], list(exact)) < 2e-6


def test_gradients_over_several_spans_are_those_of_the_reference_and_nothing_is_read_unwritten() -> None:
    given = modes("legt") | dict(C=torch.randn(1, N // 2, dtype=torch.complex128))
    given["Q"] = given["P"] + 0.1
    given |= dict(u=torch.randn(2, 150, 1, dtype=torch.float64), dt=0.1 * torch.rand(2, 150, 1, dtype=torch.float64))
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    start, results = torch.rand(2, 150) < 0.03, []
    for backend in ("reference", None):
        with poisoned_memory():
            y, final = ops.dplr_scan(**leaves, start=start, alpha=0.8, backend=backend)
            total = y.sin().sum() + torch.view_as_real(final).cos().sum()
            results.append([y.detach(), final.detach(), *torch.autograd.grad(total, list(leaves.values()))])
    assert largest_error(results[1], results[0]) < 1e-10
