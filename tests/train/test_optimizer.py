"""Parameter groups and the learning rate over a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longstate.train.optimizer import adamw, rate_factor, set_rates


def test_only_matrices_decay_and_a_mixer_may_ask_for_less() -> None:
    model = nn.Module()
    model.weight, model.norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    model.A_log, model.step = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    model.A_log._no_weight_decay = model.step._no_weight_decay = True
    model.A_log._lr, model.step._lr = 1e-3, 1.0
    groups = adamw(model, learning_rate=1e-2, weight_decay=0.1).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    names = ("weight", "norm", "A_log", "step")
    assert [found[id(getattr(model, name))] for name in names] == [(1e-2, 0.1), (1e-2, 0.0), (1e-3, 0.0), (1e-2, 0.0)]
    set_rates(groups, 0.5)
    assert sorted({group["lr"] for group in groups}) == [5e-4, 5e-3]


def test_the_rate_rises_and_falls() -> None:
    assert rate_factor(0.05, 0.1) == 0.5
    assert rate_factor(0.1, 0.1) == 1.0
    assert rate_factor(0.55, 0.1) == pytest.approx(0.505)
    assert rate_factor(1.0, 0.1) == pytest.approx(0.01)
    assert rate_factor(0.0, 0.0) == 1.0
