"""A model's step with states that change in place: the same numbers as the model's own, and values on the outside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longstate import LanguageModel, ops
from longstate import state as states
from longstate.compression import quantize
from longstate.mixers import MIXERS
from longstate.models.captured import CapturedStep
from longstate.ops import _program_cpu, _register, _triton

LAYERS = ["mamba2", "mamba", "rglru", {"mixer": "s5", "d_state": 8}, {"mixer": "attention", "n_heads": 2, "window": 3}]


def model(layers: list[Any], d_model: int = 64, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=16, d_model=d_model, layers=layers, **options).eval()


def differ(a: Any, b: Any) -> float:
    pairs = zip(states.flatten(a).values(), states.flatten(b).values(), strict=True)
    return torch.stack([(x.float() - y.float()).abs().max() for x, y in pairs]).max().item()


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


def test_a_state_with_gradients_leaves_no_graph_behind() -> None:
    one = model(LAYERS[:2])
    _, read = one(torch.randint(16, (2, 3)))
    assert any(x.requires_grad for x in torch.utils._pytree.tree_leaves(read))
    step = CapturedStep(one, 2)
    step.load(read)
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(step._state))


def test_what_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match=r"layers\[1\] .* grows with what was read"):
        CapturedStep(model(["mamba2", {"mixer": "attention", "n_heads": 2}]), 1)
    with pytest.raises(ValueError, match="has no state"):
        CapturedStep(model(["tnn"]), 1)
    with pytest.raises(ValueError, match="the model has experts"):
        CapturedStep(model(["mamba2"], mlp={"kind": "experts", "hidden": 8, "n_experts": 2, "top_k": 1}), 1)
    step = CapturedStep(model(["mamba2"]), 2)
    with pytest.raises(ValueError, match=r"tokens of shape \[3\], wanted \[2\]"):
        step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="a tensor of shape"):
        step.load(step.model.initial_state(3))


def has_state(name: str) -> bool:
    """Whether a layer has a state of a fixed size."""
    state = LAYER[name].initial_state(1)
    return state is not None and not states.growing(state)


OPTIONS: dict[str, dict[str, Any]] = {"attention": {"n_heads": 2, "window": 3}}
LAYER = {name: kind(64, **OPTIONS.get(name, {})) for name, kind in MIXERS.items()}


class NothingWaits(TorchDispatchMode):
    """Refuses what has to know a number before it goes on, and what copies one from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.name().removeprefix("aten::").split(".")[0], [x for x in args if isinstance(x, list)]
        waits = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "lift_fresh", "_linalg_check_errors"}
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, torch.Tensor) and x.dtype is torch.bool for part in given for x in part
        )
        assert name not in waits and not masks, f"a GPU would have to be waited for: {name}"
        return func(*args, **(kwargs or {}))


CASES = [(name, OPTIONS.get(name, {})) for name in MIXERS if has_state(name)]
CASES += [("s4", {"measure": "legt"}), ("lssl", {"alpha": 1.0}), ("s5", {"n_blocks": 2})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_nothing_of_a_step_waits_for_a_gpu(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is asked of a tensor, and none is copied there, which no graph could hold."""
    for op, names in _register._BACKENDS.items():  # what a GPU without a kernel of its own runs
        monkeypatch.setitem(_register._BACKENDS, op, tuple(x for x in names if x != "cpu"))
    monkeypatch.setattr(_program_cpu, "there", lambda: False)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a GPU would have to be waited for")

    step, token = CapturedStep(model([{"mixer": name, **options}]), 2), torch.tensor([3, 5])
    step(token)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "nonzero", "new_tensor"):
            patch.setattr(torch.Tensor, method, refuse)
        for method in ("__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, method, refuse)
        for function in ("tensor", "as_tensor"):
            patch.setattr(torch, function, refuse)
        with NothingWaits():
            step(token)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for GPUs alone, in their interpreter."""
    for op, names in _register._BACKENDS.items():
        if "triton" in names:
            monkeypatch.setitem(_register._BACKENDS, op, ("triton", *names))
    monkeypatch.setattr(_program_cpu, "there", lambda: False)


SMALL = {"mixer": "mamba2", "head_dim": 8, "d_state": 16}
TWO_GROUPS = SMALL | {"n_groups": 2, "d_conv": 3, "dt_limit": [0.01, 0.1]}
MAMBA = {"mixer": "mamba", "d_state": 8}
FALCON = MAMBA | {"inner_norm": "weighted"}


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("layers", "kind", "batch"),
    [
        *(([SMALL, MAMBA], kind, 2) for kind in ("float32", "bfloat16", "int8")),
        ([TWO_GROUPS, "rglru", SMALL], "float32", 2),
        ([FALCON], "bfloat16", 2),
        ([SMALL], "bfloat16", 9),  # more than the products' kernel takes
    ],
)
def test_programs_are_the_layers(layers: list[Any], kind: str, batch: int, kernels: None) -> None:
    """A captured step runs few kernels, and gives what the model gives: in bfloat16 within what rounding once more or
    less changes, by comparison with the same in float64."""
    torch.manual_seed(0)
    one = LanguageModel(vocab_size=16, d_model=16, layers=layers, residual_multiplier=0.5).eval()
    for p in one.parameters():
        p.data += torch.randn_like(p) / 16
    tokens = torch.randint(16, (2, batch))
    wanted, after = run(copy.deepcopy(one).double(), tokens)
    if kind == "int8":
        quantize(one, group=None)
        wanted, after = run(copy.deepcopy(one).double(), tokens)
    one = one.bfloat16() if kind == "bfloat16" else one
    step = CapturedStep(one, batch)
    with _triton.asked() as asked:
        got = torch.stack([step(token).clone() for token in tokens])
    names = [x.kernel for x, _ in asked]
    products = sum(PRODUCTS.get(layer if isinstance(layer, str) else layer["mixer"], 0) for layer in layers)
    assert names.count("token_product") == (products * len(tokens) if batch == 2 else 0)
    apart = layers.count("rglru") if batch == 2 else len(layers)  # the other convolutions are in products
    assert names.count("short_convolution") == apart * len(tokens)
    plain, _ = run(one, tokens)
    error, usual = ((x.double() - wanted).abs().max().item() for x in (got, plain))
    assert error <= 1.5 * usual + 1e-6
    assert differ(step.state, after) <= (0.05 if kind == "bfloat16" else 1e-5)


PRODUCTS = {"mamba2": 2, "mamba": 4}


def run(one: LanguageModel, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return the logits of each step, and the last state."""
    state, logits = one.initial_state(tokens.shape[1]), []
    with torch.no_grad():
        for token in tokens:
            y, state = one(token[:, None], state)
            logits.append(y[:, 0])
    return torch.stack(logits), state


@pytest.mark.interpreted
def test_kernels_write_new_states_where_old_ones_are(kernels: None) -> None:
    """Those of the recurrences; and only inside of a step."""
    assert ops.backends()["linear_attention"]["triton"] == "in use on GPUs"
    one = model([SMALL, MAMBA], 16)
    with torch.no_grad(), _triton.asked() as asked:
        token = torch.tensor([[3], [5]])
        state = one.initial_state(2)
        _, after = one(token, state)
        for old, new in zip(after, state, strict=True):
            assert old.ssm.data_ptr() != new.ssm.data_ptr()
        kept = states.copy(state)
        assert differ(state, kept) == 0
        for programs in (False, True):
            state = states.copy(kept)
            with _triton.in_place(), pytest.MonkeyPatch.context() as patch:
                if not programs:
                    patch.setattr(_triton, "captured", lambda x: False)
                _, same = one(token, state)
            for old, new in zip(same, state, strict=True):
                assert old.ssm.data_ptr() == new.ssm.data_ptr()
            assert differ(same, after) < 1e-6
    assert {x.kernel for x, _ in asked} >= {"selective_scan", "linear_attention.step", "token_product"}
