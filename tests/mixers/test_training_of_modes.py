"""What an optimiser does to diagonal layers: it decays no mode, and makes none unstable where that is promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longstate import DSS, LRU, S4D, S5, Mixer
from longstate.mixers._modes import real_part
from longstate.train.optimizer import adamw

LAYERS: dict[str, Callable[[], Any]] = {
    **{f"s4d {kind}": lambda kind=kind: S4D(3, 6, kind, output="identity") for kind in ("legs", "dfout", "ptd")},
    "s4d stable": lambda: S4D(3, 6, "lin", parameterization="stable", output="identity"),
    "s4d softplus": lambda: S4D(3, 6, "inv", "bilinear", "softplus", output="identity"),
    "s5": lambda: S5(3, 6, output="identity"),
    "s5 ptd": lambda: S5(3, 6, output="identity", initialization="ptd"),
    "lru": lambda: LRU(3, 6, output="identity"),
    "dss": lambda: DSS(3, 6, output="identity"),
}
UNBOUNDED: dict[str, Callable[[], Any]] = {
    "s4d direct": lambda: S4D(3, 6, parameterization="direct", output="identity"),
    "dss softmax": lambda: DSS(3, 6, "softmax", 30, output="identity"),
}


def slowest_decay(mixer: Any) -> float:
    """Return the largest log |pole| times a positive number: at 0 or above, the layer is unstable."""
    if isinstance(mixer, LRU):
        return -mixer.nu_log.exp().min().item()
    if isinstance(mixer, DSS):
        return mixer.modes()[1].real.max().item()
    return real_part(mixer.A_real, mixer.parameterization).max().item()


def trained(mixer: Mixer, steps: int = 40) -> float:
    """Pay a layer for outputs that grow, at a rate no one would choose; return the worst of its decays on the way."""
    optimiser, worst = torch.optim.Adam(mixer.parameters(), lr=0.3), slowest_decay(mixer)
    x = torch.randn(2, 30, 3)
    for _ in range(steps):
        y, _ = mixer(x)
        optimiser.zero_grad()
        (-(1 + y[:, -10:].square().mean()).log()).backward()
        optimiser.step()
        worst = max(worst, slowest_decay(mixer))
        if worst >= 0:
            break
    return worst


@pytest.mark.parametrize("name", LAYERS)
def test_no_training_makes_a_bounded_mode_unstable(name: str) -> None:
    mixer = LAYERS[name]()
    before = slowest_decay(mixer)
    assert before < trained(mixer) < 0
    assert mixer(torch.randn(1, 300, 3))[0].isfinite().all()


@pytest.mark.parametrize("name", UNBOUNDED)
def test_the_same_training_takes_the_others_over_the_edge(name: str) -> None:
    """The negative control: training pushes modes there, and nothing holds these."""
    assert trained(UNBOUNDED[name]()) >= 0


@pytest.mark.parametrize("name", [*LAYERS, *UNBOUNDED])
def test_weight_decay_moves_nothing_of_a_system(name: str) -> None:
    mixer = (LAYERS | UNBOUNDED)[name]()
    weight = torch.nn.Linear(3, 3)
    before = {key: p.detach().clone() for key, p in mixer.named_parameters()}
    optimiser = adamw(torch.nn.ModuleList([mixer, weight]), learning_rate=0.1, weight_decay=0.5)
    for parameter in (*mixer.parameters(), *weight.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    size = weight.weight.norm().item()
    optimiser.step()
    assert weight.weight.norm().item() < 0.96 * size
    assert all(torch.equal(p, before[key]) for key, p in mixer.named_parameters())
