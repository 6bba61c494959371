"""LSSL against SciPy's discretisations: sampled regularly and irregularly, in whole and from a state."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from longstate import LSSL, Timeline
from longstate.mixers.lssl import LSSLState


@pytest.mark.parametrize("irregular", [False, True], ids=["regular", "irregular"])
@pytest.mark.parametrize(("shared", "measure", "alpha"), [(True, "legs", 0.5), (False, "fout", 0.8)])
def test_it_is_what_scipy_makes_of_the_continuous_system(
    shared: bool, measure: str, alpha: float, irregular: bool
) -> None:
    n, length = 6, 90
    mixer = LSSL(2, n, measure, shared, alpha, output="identity").double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, initial = torch.randn(1, length, 2, dtype=torch.float64), torch.randn(1, 2, n, dtype=torch.float64)
    elapsed = 0.1 + 3 * torch.rand(1, length, dtype=torch.float64)
    y, state = mixer(x, LSSLState(initial), Timeline(dt=elapsed) if irregular else None)
    B, C, D, dt = (p.detach().numpy() for p in (mixer.B, mixer.C, mixer.D, mixer.log_dt.exp()))
    A = mixer.A.detach().expand(2, -1, -1).numpy()
    for d in range(2):
        h, wanted = initial[0, d].numpy(), []
        for t in range(length):
            step = dt[d] * (elapsed[0, t].item() if irregular else 1)
            system = (A[d], B[d, :, None], C[d, None], D[d, None, None])
            Ad, Bd, *_ = scipy.signal.cont2discrete(system, step, method="gbt", alpha=alpha)
            h = Ad @ h + Bd[:, 0] * x[0, t, d].item()
            wanted.append(C[d] @ h + D[d] * x[0, t, d].item())
        np.testing.assert_allclose(y[0, :, d].detach(), wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())
        np.testing.assert_allclose(state.ssm[0, d].detach(), h, rtol=0, atol=1e-11 * np.abs(h).max())


def test_one_elapsed_time_for_all_is_another_step() -> None:
    """And still goes by chunks: the same as a step after the other."""
    mixer, x = LSSL(3, 4).double(), torch.randn(2, 70, 3, dtype=torch.float64)
    once, each = mixer(x, None, Timeline(dt=torch.tensor(1.7))), mixer(x, None, Timeline(dt=torch.full((2, 70), 1.7)))
    torch.testing.assert_close(once, each, rtol=1e-5, atol=1e-5)  # 1.7 is rounded to float32
    assert (once[0] - mixer(x)[0]).abs().max() > 1e-3


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"alpha from 0\.5 to 1"):
        LSSL(4, alpha=0.3)
    with pytest.raises(ValueError, match="Did you mean"):
        LSSL(4, measure="leg")
    with pytest.raises(ValueError, match="odd"):
        LSSL(4, 3, "fout")
