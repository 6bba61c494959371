"""Stacks and language models: what their options do, and that what they say no to is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from longstate import LRU, S4D, S5, LanguageModel, Stack, Timeline, load, save
from longstate.generate import read
from longstate.models.stack import GatedMLP
from longstate.routes import Bidirectional, HiSS

LAYERS: list[Any] = [
    {"mixer": "mamba", "d_state": 4},
    {"mixer": "s4d", "d_state": 4},
    {"mixer": "mamba2", "d_state": 4, "head_dim": 8},
    {"mixer": "attention", "n_heads": 2, "window": 4},
    "s5",
]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_blocks_are_pre_norm_and_residual() -> None:
    stack = Stack(8, ["s5", {"mixer": "s4d", "d_state": 4}], mlp={"hidden": 12}).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    residual = x
    for block in stack.layers:
        residual = residual + block.mixer(block.norm(residual))[0]
        u, gate = functional.linear(block.norm2(residual), block.mlp.fc1.weight).chunk(2, -1)
        residual = residual + functional.linear(u * functional.silu(gate), block.mlp.fc2.weight)
    wanted = functional.rms_norm(residual, (8,), stack.norm_f.weight, 1e-5)
    torch.testing.assert_close(stack(x)[0], wanted, rtol=1e-12, atol=1e-12)


def test_an_mlp_for_one_layer_only() -> None:
    stack = Stack(8, ["s5", {"mixer": "s5", "mlp": {"hidden": 4}}, {"mixer": "s5", "mlp": None}])
    assert [block.mlp is not None for block in stack.layers] == [False, True, False]
    assert GatedMLP(96).fc2.in_features == 256


def test_activation_checkpointing_changes_memory_and_nothing_else() -> None:
    torch.manual_seed(1)
    plain = LanguageModel(17, 16, LAYERS, mlp={}).double()
    lean = LanguageModel.from_config({**plain.config, "checkpoint_activations": True}).double()
    lean.load_state_dict(plain.state_dict())
    tokens = torch.randint(17, (2, 12))
    timeline = Timeline(start=torch.rand(2, 12) < 0.2)
    kept: dict[str, int] = {}
    results = {}
    for name, model in (("plain", plain), ("lean", lean)):
        kept[name] = 0

        def count(x: Tensor, name: str = name) -> Tensor:
            kept[name] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss, _ = model.loss(tokens, tokens, None, timeline)
        results[name] = [loss.detach(), *gradients(model, loss)]
    for a, b in zip(results["plain"], results["lean"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert kept["lean"] < kept["plain"] / 3


@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_stream_stays_wide_if_wanted(wide: bool) -> None:
    model = LanguageModel(17, 16, LAYERS, residual_in_fp32=wide).bfloat16()
    seen = []
    for block in model.backbone.layers:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].dtype))
    logits, _ = model(torch.randint(17, (1, 5)))
    assert set(seen) == {torch.float32 if wide else torch.bfloat16}
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not(tied: bool) -> None:
    model = LanguageModel(10, 8, ["s5"], tie_embeddings=tied, pad_vocab_size_multiple=8)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied
    assert model.lm_head.weight.shape == (16, 8)
    model.reset_parameters()
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied


def test_a_configuration_builds_the_same_model_again() -> None:
    model = LanguageModel(17, 16, LAYERS, mlp={"hidden": 20}, norm_eps=1e-6)
    again = LanguageModel.from_config(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(17, (2, 7))
    assert torch.equal(again(tokens)[0], model(tokens)[0])


ROUTES: list[Any] = [
    {"mixer": "hiss", "lower": {"mixer": "s4d", "d_state": 4}, "higher": "s5", "chunk": 3, "mlp": {"hidden": 8}},
    {"mixer": "bidirectional", "ahead": "lru"},
    {"mixer": "bidirectional", "ahead": "s5", "back": {"mixer": "hiss", "lower": "s5", "higher": "lru", "chunk": 2}},
    {"mixer": "bidirectional", "ahead": "s5", "back": None},
]


def test_routes_by_name_are_those_made_by_hand_and_come_back_from_a_file(tmp_path: Path) -> None:
    model = LanguageModel(17, 16, ROUTES)
    made = [
        HiSS(S4D(16, 4), S5(16), 3),
        Bidirectional(LRU(16)),
        Bidirectional(S5(16), HiSS(S5(16), LRU(16), 2)),
        Bidirectional(S5(16)),
    ]
    x, tokens = torch.randn(2, 7, 16), torch.randint(17, (2, 7))
    for block, route in zip(model.backbone.layers, made, strict=True):
        route.load_state_dict(block.mixer.state_dict())
        assert torch.equal(block.mixer(x)[0], route(x)[0])
    assert model.backbone.layers[0].mlp is not None and model.backbone.layers[1].mlp is None
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(tokens)[0], model(tokens)[0])


def test_no_text_is_continued_by_a_layer_without_a_state() -> None:
    with pytest.raises(ValueError, match=r"layers\[1\] .*bidirectional.* has no state"):
        read(LanguageModel(17, 16, ["s5", {"mixer": "bidirectional", "ahead": "s5"}]), [[1, 2]])


def test_the_loss_leaves_out_what_it_is_told_to() -> None:
    model = LanguageModel(17, 16, ["s5"])
    tokens, targets = torch.randint(17, (2, 6)), torch.randint(17, (2, 6))
    targets[0, 3:] = -100
    logits = model(tokens)[0]
    rows = [-logits[i, t].log_softmax(-1)[targets[i, t]] for i in range(2) for t in range(6) if targets[i, t] >= 0]
    torch.testing.assert_close(model.loss(tokens, targets)[0], torch.stack(rows).mean())


def test_branches_start_small_in_a_deep_stack() -> None:
    def size(layers: int) -> float:
        weights = [block.mixer.out_proj.weight for block in Stack(32, ["mamba"] * layers).layers]
        return float(torch.stack([w.detach().std() for w in weights]).mean())

    assert size(16) == pytest.approx(size(1) / 4, rel=0.1)


def test_construction_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LanguageModel(17, 16, LAYERS, mlp={})
    model.to_empty(device="cpu").reset_parameters()
    assert all(bool(x.isfinite().all()) for x in model.parameters())
    assert model.lm_head.weight is model.backbone.embedding.weight


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"layers": ["mamba3"]}, r"layers\[0\]: there is no mixer 'mamba3'. Did you mean 'mamba"
    yield {"layers": ["s5", {"mixer": "mamba", "d_stat": 4}]}, r"layers\[1\]: mamba has no option 'd_stat'. Did you"
    yield {"layers": [{"d_state": 4}]}, r"layers\[0\] = .*wanted the name of a mixer"
    yield {"layers": [{"mixer": 3}]}, r"layers\[0\] = {'mixer': 3}: wanted the name of a mixer"
    yield {"layers": [{"mixer": None}]}, "a layer without a mixer has an mlp"
    yield {"layers": ["bidirectionl"]}, r"layers\[0\]: there is no mixer 'bidirectionl'. Did you mean 'bidirectional'"
    yield {"layers": ["bidirectional"]}, r"layers\[0\]: bidirectional: ahead is missing"
    yield {"layers": [{"mixer": "bidirectional", "ahead": None}]}, r"bidirectional: ahead = None: wanted the name of a"
    yield (
        {"layers": [{"mixer": "bidirectional", "ahead": "s6"}]},
        r"layers\[0\]: bidirectional: ahead: there is no mixer",
    )
    yield {"layers": [{"mixer": "bidirectional", "ahead": "s5", "bak": "s5"}]}, "no option 'bak'. Did you mean 'back'"
    yield {"layers": [{"mixer": "hiss", "lower": "s5", "higher": "s5", "chunk": 2.5}]}, "chunk is 2.5, wanted int"
    yield {"layers": "mamba2"}, "wanted a list with an entry for each layer"
    yield {"layers": ["s5"], "mlp": {"hiden": 3}}, "mlp has no option 'hiden'. Did you mean 'hidden'"
    yield {"layers": ["s5"], "mlp": {"hidden": 0}}, "at least one inner channel"
    yield {"layers": ["s5"], "vocab_size": 0}, "sizes start at 1"
    yield {"layers": ["s5"], "norm_eps": 0.0}, "wanted a small positive number"


@pytest.mark.parametrize(("options", "message"), list(wrong()))
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_config({"vocab_size": 7, "d_model": 16, **options})


def test_an_unknown_entry_or_a_missing_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown entry 'd_modell'\. Did you mean 'd_model'"):
        LanguageModel.from_config({"vocab_size": 7, "d_modell": 16, "layers": []})
    with pytest.raises(ValueError, match="d_model is missing"):
        LanguageModel.from_config({"vocab_size": 7, "layers": []})


def test_a_state_of_another_depth() -> None:
    model = LanguageModel(7, 16, ["s5", "s5"])
    with pytest.raises(ValueError, match="a state of 1 layers came to a stack of 2"):
        model(torch.zeros(1, 2, dtype=torch.long), model.initial_state(1)[:1])
