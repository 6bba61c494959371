"""Classifiers: padding changes nothing, windows are of time, and another sampling rate is a dt."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from longstate import Classifier, Timeline
from longstate.models.classifier import shorten

LAYERS = [{"mixer": "s4d", "d_state": 4}, {"mixer": "s5", "d_state": 4}, {"mixer": "s4d", "d_state": 4}]


def model(pooling: str = "mean") -> Classifier:
    return Classifier(2, 3, 8, LAYERS, mlp={"hidden": 8}, pool=[4, 1, 2], expand=2, pooling=pooling).double()  # type: ignore[arg-type]


def windows(x: Tensor, dt: Tensor, valid: Tensor, factor: int) -> list[dict[int, Tensor]]:
    """Average by dictionaries: of each row, the mean of the steps whose time lies in a window."""
    rows = []
    for i in range(len(x)):
        elapsed, found, begun = 0.0, dict[int, list[Tensor]](), False
        for j in range(x.shape[1]):
            if valid[i, j]:
                elapsed, begun = elapsed + float(dt[i, j]) * begun, True
                found.setdefault(int(elapsed // factor), []).append(x[i, j])
        rows.append({window: torch.stack(steps).mean(0) for window, steps in found.items()})
    return rows


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_anywhere_changes_nothing(pooling: str) -> None:
    net, x = model(pooling), torch.randn(1, 13, 2, dtype=torch.float64)
    alone = net(x)
    for where in ([*range(13)], [*range(7, 20)], [0, 1, 2, 5, 6, 7, 8, 9, 10, 13, 15, 16, 19]):
        row, valid = torch.randn(2, 20, 2, dtype=torch.float64), torch.zeros(2, 20, dtype=torch.bool)
        row[0, where], valid[0, where], valid[1] = x[0], True, True
        torch.testing.assert_close(net(row, Timeline(valid=valid))[:1], alone, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(net(row)[:1], alone, rtol=1e-3), "padding that counts is seen"


def test_mean_and_last_are_of_the_steps_that_count() -> None:
    x, valid = torch.randn(2, 11, 2, dtype=torch.float64), torch.arange(11) < torch.tensor([[11], [6]])
    for pooling in ("mean", "last"):
        net = Classifier(2, 3, 8, ["s5"], pooling=pooling).double()  # type: ignore[arg-type]
        hidden, _ = net.stacks[0](net.encoder(x))
        wanted = torch.stack(
            [hidden[0].mean(0), hidden[1, :6].mean(0)] if pooling == "mean" else [hidden[0, -1], hidden[1, 5]]
        )
        torch.testing.assert_close(net(x, Timeline(valid=valid)), net.head(wanted), rtol=1e-12, atol=1e-12)


def test_windows_of_regular_steps() -> None:
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    short, timeline = shorten(x, Timeline(), 4)
    torch.testing.assert_close(short, torch.stack([x[:, :4].mean(1), x[:, 4:8].mean(1), x[:, 8:].mean(1)], 1))
    assert timeline == Timeline()
    half, timeline = shorten(x, Timeline(dt=torch.tensor([2.0])), 4)
    torch.testing.assert_close(half, torch.stack([x[:, i : i + 2].mean(1) for i in range(0, 11, 2)], 1))
    assert timeline == Timeline(), "after the windows, time runs at the nominal rate again"


@pytest.mark.parametrize("case", ["whole", "tenths", "left", "irregular"])
def test_windows_of_time_are_those_of_a_loop(case: str) -> None:
    x = torch.randn(3, 24, 2, dtype=torch.float64)
    valid = torch.ones(3, 24, dtype=torch.bool) if case in ("whole", "tenths") else torch.rand(3, 24) < 0.7
    dt = torch.ones(3, 24, dtype=torch.float64)
    dt = dt * 0.4 if case == "tenths" else torch.rand(3, 24, dtype=torch.float64) * 7 if case == "irregular" else dt
    short, timeline = shorten(x, Timeline(dt=dt, valid=valid), 4)
    given = windows(x, torch.full_like(dt, 0.4 + 1e-12) if case == "tenths" else dt, valid, 4)
    assert timeline.valid is not None and timeline.dt is not None
    for i, found in enumerate(given):
        assert timeline.valid[i].nonzero().flatten().tolist() == sorted(found)
        gaps = torch.diff(torch.tensor(sorted(found)), prepend=torch.tensor([-1]))
        assert timeline.dt[i][timeline.valid[i]].tolist() == gaps.tolist()
        for window, mean in found.items():
            torch.testing.assert_close(short[i, window], mean, rtol=1e-12, atol=1e-12)
    assert (case == "irregular") == bool(timeline.dt[timeline.valid].max() > 1)


def test_half_the_sampling_rate_is_the_same_sound() -> None:
    time = torch.arange(512, dtype=torch.float64)
    x = torch.stack([torch.sin(2 * math.pi * time / period) for period in (90.0, 150.0)], -1)[None]
    layers = [{"mixer": "s4d", "d_state": 4, "dt_max": 0.02}, {"mixer": "s5", "d_state": 4}]
    net = Classifier(2, 5, 8, layers, pool=[8, 1]).double()
    full, half = net(x), net(x[:, ::2], Timeline(dt=torch.tensor([2.0], dtype=torch.float64)))
    assert (half - full).abs().max() < 0.02 * full.std()
    assert (net(x[:, ::2]) - full).abs().max() > 0.1 * full.std(), "without dt it is another sound"


def test_its_configuration_builds_it_again() -> None:
    net = model("last")
    again = Classifier.from_config(json.loads(json.dumps(net.config))).double()
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    assert torch.equal(net(x), again(x)) and again.config == net.config
    with torch.device("meta"):
        bare = model()
    bare.to_empty(device="cpu").reset_parameters()
    assert bare(x).isfinite().all()


def test_what_makes_no_sense_is_named() -> None:
    with pytest.raises(ValueError, match=r"pool=\[2\]\): wanted a whole number from 1 for each of the 3 layers"):
        Classifier(1, 2, 8, LAYERS, pool=[2])
    with pytest.raises(ValueError, match="sizes start at 1"):
        Classifier(1, 0, 8, LAYERS)
    with pytest.raises(ValueError, match=r"unknown entry .pol.\. Did you mean"):
        Classifier.from_config({**model().config, "pol": 1})
    with pytest.raises(ValueError, match=r"input of shape \[2, 9, 1\], wanted \[batch, time, d_input=2\]"):
        model()(torch.zeros(2, 9, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="the timeline has start"):
        model()(torch.zeros(2, 9, 2, dtype=torch.float64), Timeline(start=torch.zeros(2, 9, dtype=torch.bool)))


def test_a_row_of_no_steps_is_no_number_out_of_nothing() -> None:
    x, valid = torch.randn(2, 9, 2, dtype=torch.float64), torch.tensor([[True], [False]]).expand(2, 9)
    for pooling in ("mean", "last"):
        logits = model(pooling)(x, Timeline(valid=valid))
        assert logits.isfinite().all()
