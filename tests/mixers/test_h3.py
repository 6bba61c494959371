"""H3 against matrix exponentials, one outer product after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from longstate import H3


@pytest.mark.parametrize("head_dim", [1, 2, 4])
@pytest.mark.parametrize("length", [9, 70])
def test_by_matrix_exponentials(head_dim: int, length: int) -> None:
    mixer = H3(4, 4, head_dim, d_conv=3, dt_min=0.1, dt_max=0.5).double()
    x = torch.randn(1, length, 4, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x)[0][0].numpy()
        q, k, v = (layer(x)[0].numpy() for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        taps = mixer.conv1d.weight[:, 0].numpy()
        A = -mixer.log_A_real.exp().numpy() + 1j * mixer.A_imag.numpy()
        C, D, dt = torch.view_as_complex(mixer.C).numpy(), mixer.D.numpy(), mixer.log_dt.exp().numpy()
    k = np.stack([np.convolve(taps[i, ::-1], k[:, i])[:length] for i in range(4)], 1)
    y = np.zeros((length, 4))
    for head in range(4 // head_dim):
        at = slice(head * head_dim, (head + 1) * head_dim)
        # A mode is a real block [[a, −b], [b, a]] with the input in its first row, beside the held input itself.
        n = len(A[head])
        block = np.zeros((2 * n + 1, 2 * n + 1))
        for i, mode in enumerate(A[head]):
            block[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[mode.real, -mode.imag], [mode.imag, mode.real]]
            block[2 * i, -1] = 1
        step = expm(dt[head] * block)
        readout = 2 * np.stack([C[head].real, -C[head].imag], 1).reshape(-1)
        state = np.zeros((2 * n, head_dim, head_dim))
        for t in range(length):
            outer = np.outer(k[t, at], v[t, at])
            state = np.tensordot(step[:-1, :-1], state, 1) + step[:-1, -1, None, None] * outer
            y[t, at] = q[t, at] @ (np.tensordot(readout, state, 1) + D[head] * outer)
    with torch.no_grad():
        wanted = mixer.o_proj(torch.from_numpy(y)).numpy()
    assert np.abs(got - wanted).max() < 1e-12 * max(1, np.abs(wanted).max())
    assert np.abs(wanted - mixer.o_proj.bias.detach().numpy()).max() > 1e-2


def test_sizes_that_do_not_go_together() -> None:
    for options, message in (
        (dict(d_state=5), "6"),
        (dict(head_dim=3), "multiple"),
        (dict(d_conv=0), "tap"),
        (dict(dt_min=0.2), "dt_min"),
    ):
        with pytest.raises(ValueError, match=message):
            H3(4, **options)
