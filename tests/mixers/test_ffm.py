"""FFM against its sum over all inputs, written out; and its initial values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from longstate import FFM, Timeline


def wanted(mixer: FFM, x: torch.Tensor, at: np.ndarray) -> np.ndarray:
    """Return the outputs of one sequence whose steps happen at given times, without a recurrence: every input is
    weighed by its age."""

    def affine(layer: torch.nn.Linear, part: slice) -> np.ndarray:
        return x.numpy() @ layer.weight.detach().numpy()[part].T + layer.bias.detach().numpy()[part]

    m, d = mixer.d_memory, mixer.d_model
    first, second = slice(0, m), slice(m, 2 * m)
    gated = affine(mixer.in_proj, first) / (1 + np.exp(-affine(mixer.in_proj, second)))
    exponent = -np.abs(mixer.alpha.detach().numpy())[:, None] + 1j * mixer.omega.detach().numpy()
    memory = np.zeros((len(x), m, mixer.d_context), complex)
    for t in range(len(x)):
        for s in range(t + 1):
            memory[t] += np.exp(exponent * (at[t] - at[s])) * gated[s][:, None]
    read = np.concatenate([memory.real, memory.imag], 2).reshape(len(x), -1)
    z = read @ mixer.h_proj.weight.detach().numpy().T + mixer.h_proj.bias.detach().numpy()
    z = functional.layer_norm(torch.from_numpy(z), (d,)).numpy()
    gate = 1 / (1 + np.exp(-affine(mixer.x_proj, slice(d, 2 * d))))
    return z * gate + affine(mixer.x_proj, slice(0, d)) * (1 - gate)


@pytest.mark.parametrize("timed", [False, True], ids=["regular", "irregular"])
def test_every_input_weighed_by_its_age(timed: bool) -> None:
    mixer = FFM(3, 5, 2, decay_max=0.5, period_min=3.0, period_max=20.0).double()
    with torch.no_grad():
        mixer.alpha[1] *= -1  # an optimiser may take it there: it decays all the same
    x = torch.randn(1, 40, 3, dtype=torch.float64)
    dt = 0.1 + 3 * torch.rand(1, 40, dtype=torch.float64) if timed else torch.ones(1, 40, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x, None, Timeline(dt) if timed else None)[0][0].numpy()
    np.testing.assert_allclose(got, wanted(mixer, x[0], dt[0].cumsum(0).numpy()), rtol=0, atol=1e-11)


def test_initial_values() -> None:
    mixer = FFM(4, 5, 4, decay_min=0.1, decay_max=0.5, period_min=2, period_max=8).double()
    mixer.reset_parameters()
    np.testing.assert_allclose(mixer.alpha.detach(), [0.1, 0.2, 0.3, 0.4, 0.5])
    np.testing.assert_allclose(2 * math.pi / mixer.omega.detach(), [2, 4, 6, 8])
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {f"{part}_proj.{kind}" for part in ("in", "h", "x") for kind in ("weight", "bias")}


@pytest.mark.parametrize("options", [{"d_memory": 0}, {"d_context": 0}, {"decay_min": 0.0}, {"period_max": 0.5}])
def test_options_that_make_no_sense(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        FFM(3, **options)
