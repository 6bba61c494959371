"""A model's step with states that change in place: the same numbers as the model's own, and values on the outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstate import LanguageModel, ops
from longstate import state as states
from longstate.models.captured import CapturedStep
from longstate.ops import _program, _register, _triton

LAYERS = ["mamba2", "mamba", "rglru", {"mixer": "s5", "d_state": 8}, {"mixer": "attention", "n_heads": 2, "window": 3}]


def model(layers: list[Any]) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=16, d_model=64, layers=layers).eval()


def differ(a: Any, b: Any) -> float:
    pairs = zip(states.flatten(a).values(), states.flatten(b).values(), strict=True)
    return max((x.float() - y.float()).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("layers", [LAYERS[:4], LAYERS])
def test_steps_are_the_models(layers: list[Any]) -> None:
    one = model(layers)
    state: Any = one.initial_state(3)
    step = CapturedStep(one, 3)
    for _ in range(5):
        token = torch.randint(16, (3,))
        with torch.no_grad():
            logits, state = one(token[:, None], state)
        assert (step(token) - logits[:, 0]).abs().max() < 1e-6
        assert differ(step.state, state) < 1e-6


def test_states_are_values() -> None:
    """What was taken out or put in does not change with the next token, and can be gone back to."""
    step = CapturedStep(model(LAYERS[:4]), 2)
    token = torch.tensor([3, 5])
    step(token)
    before = step.state
    kept = states.copy(before)
    again = step(token).clone()
    assert differ(before, kept) == 0
    assert differ(step.state, before) > 0
    step.load(before)
    assert differ(step.state, before) == 0
    assert torch.equal(step(token), again)
    assert differ(before, kept) == 0


def test_what_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match=r"layers\[1\] .* grows with what was read"):
        CapturedStep(model(["mamba2", {"mixer": "attention", "n_heads": 2}]), 1)
    with pytest.raises(ValueError, match="has no state"):
        CapturedStep(model(["tnn"]), 1)
    step = CapturedStep(model(["mamba2"]), 2)
    with pytest.raises(ValueError, match=r"tokens of shape \[3\], wanted \[2\]"):
        step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="a tensor of shape"):
        step.load(step.model.initial_state(3))


@pytest.mark.interpreted
def test_kernels_write_new_states_where_old_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the recurrences; and only inside of a step."""
    preferred = {op: ("triton", *names) for op, names in _register._BACKENDS.items() if "triton" in names}
    for op, names in preferred.items():
        monkeypatch.setitem(_register._BACKENDS, op, names)
    monkeypatch.setattr(_program, "there", lambda: False)  # nor does the CPU's program of a token run
    assert ops.backends()["linear_attention"]["triton"] == "in use on GPUs"
    one = model(LAYERS[:2])
    with torch.no_grad(), _triton.asked() as asked:
        token = torch.tensor([[3], [5]])
        state = one.initial_state(2)
        _, after = one(token, state)
        for old, new in zip(after, state, strict=True):
            assert old.ssm.data_ptr() != new.ssm.data_ptr()
        kept = states.copy(state)
        assert differ(state, kept) == 0
        with _triton.in_place():
            _, same = one(token, state)
    assert {x.kernel for x, _ in asked} >= {"selective_scan", "linear_attention.step"}
    for old, new in zip(same, state, strict=True):
        assert old.ssm.data_ptr() == new.ssm.data_ptr()
    assert differ(same, after) == 0
