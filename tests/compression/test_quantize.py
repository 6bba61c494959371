"""Int8 weights: within half a scale, equal where they must be, refused where they make no sense."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import longstate
from longstate.analysis.cost import token_cost
from longstate.compression import quantize
from longstate.compression.quantization import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from longstate.generate import Sampling, generate
from longstate.models import LanguageModel
from longstate.models.experts import Experts, Router

LAYERS = [
    "mamba",
    {"mixer": "mamba2", "head_dim": 8, "d_state": 8},
    {"mixer": "attention", "n_heads": 2, "window": 5, "bias": True},
    "rglru",
    "short_conv",
    "s4d",
]


def model(tied: bool = True, mlp: dict[str, object] | None = None, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(61, 32, LAYERS, mlp, tie_embeddings=tied, pad_vocab_size_multiple=8).to(dtype).eval()


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_weight_changes_by_more_than_half_a_scale(group: int | None, dtype: torch.dtype) -> None:
    """A scale is rounded to the type of the weights: of the largest, that may add its 127th part times 127 / 256."""
    before = linears(model(dtype=dtype))
    after = dict(quantize(model(dtype=dtype), "int8", group).named_modules())
    for name, layer in before.items():
        if not isinstance(layer, Router):
            new = after[name]
            assert isinstance(new, QuantizedLinear) and new.quantized.dtype == torch.int8 and new.weight.dtype == dtype
            assert new.scale.shape == (layer.out_features, -(-layer.in_features // (group or layer.in_features)))
            scale = new.scale.double().repeat_interleave(layer.in_features // new.scale.shape[1], 1)
            meant = new.quantized.double() * scale
            assert ((meant - layer.weight.double()).abs() <= scale * 0.5001).all()
            assert torch.equal(
                new.weight, meant.to(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
            )
            assert (new.bias is None) == (layer.bias is None)


def test_outputs_change_by_no_more_than_the_weights_do() -> None:
    """Of one layer: |error| ≤ scale / 2 · Σ |x|, and rounding."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(70, 33)).eval()
    for rows in (1, 3, 8, 9, 40):
        x = torch.randn(rows, 1, 70)
        wanted = layer(x).detach()
        new = quantize(copy.deepcopy(layer))
        bound = new[0].scale[:, 0] / 2 * x.abs().sum(-1, keepdim=True)
        with torch.no_grad():
            assert ((new(x) - wanted).abs() <= 1.001 * bound + 1e-6).all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_the_embedding(tied: bool) -> None:
    new = quantize(model(tied))
    embedding = new.backbone.embedding
    assert isinstance(embedding, QuantizedEmbedding) == tied
    if tied:
        assert embedding.quantized is new.lm_head.quantized and embedding.scale is new.lm_head.scale
        tokens = torch.randint(61, (2, 5))
        assert torch.equal(embedding(tokens), embedding.weight[tokens])
    new.to(torch.bfloat16)
    assert new.lm_head.quantized.dtype == torch.int8 and new.lm_head.scale.dtype == torch.bfloat16
    assert not tied or embedding.quantized is new.lm_head.quantized


@torch.no_grad()
@pytest.mark.parametrize("mlp", [None, {"hidden": 40}, {"kind": "experts", "n_experts": 4, "top_k": 2, "hidden": 8}])
def test_a_model_computes_what_its_weights_stand_for(mlp: dict[str, object] | None) -> None:
    """A model of floats with the same weights gives the same, read at once and token by token."""
    new, same = quantize(model(mlp=mlp)), model(mlp=mlp)
    for name, layer in linears(same).items():
        layer.weight.copy_(new.get_submodule(name).weight)
    for name, experts in same.named_modules():
        if isinstance(experts, Experts):
            quantised = new.get_submodule(name)
            assert isinstance(quantised, QuantizedExperts) and "fc1" not in quantised._parameters
            for weight, meant in ((experts.fc1, quantised.fc1), (experts.fc2, quantised.fc2)):
                assert ((meant - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
                weight.copy_(meant)
    tokens = torch.randint(61, (2, 12))
    wanted = same(tokens)[0]
    torch.testing.assert_close(new(tokens)[0], wanted, rtol=1e-4, atol=1e-5)
    state, steps = new.initial_state(2), []
    for t in range(12):
        logits, state = new(tokens[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-4, atol=1e-5)


def test_what_was_quantised_writes_on_and_is_counted() -> None:
    new = quantize(LanguageModel(256, 16, ["mamba"]).eval())
    text = [step.text for step in generate(new, ["ab", "c"], sampling=Sampling(seed=1), max_tokens=5)]
    assert len(text) == 5
    new = quantize(model())
    before, after = token_cost(model(), 8), token_cost(new, 8)
    assert [cost.flops for cost in after] == [cost.flops for cost in before]
    # Of the head: a byte for each weight, and a scale for each of 64 rows of 32; and the last norm.
    assert before[-1].bytes_moved == 4 * 64 * 32 + 4 * 32 and after[-1].bytes_moved == 64 * 32 + 4 * 64 + 4 * 32
    assert after[-1].parameters - before[-1].parameters in (0, 64)  # its scales
    mixture = {"kind": "experts", "n_experts": 4, "top_k": 2, "hidden": 8}
    one, other = token_cost(model(mlp=mixture), 8)[1], token_cost(quantize(model(mlp=mixture)), 8)[1]
    assert 0.25 < other.bytes_moved / one.bytes_moved < 0.6


def test_gradients_pass_through() -> None:
    new = quantize(nn.Sequential(nn.Linear(6, 4)).eval())
    x = torch.randn(3, 6, requires_grad=True)
    new(x).sum().backward()
    torch.testing.assert_close(x.grad, new[0].weight.sum(0).expand(3, 6))
    assert new[0].bias.grad is not None and not new[0].quantized.requires_grad


def test_a_quantised_model_in_a_file(tmp_path: Path) -> None:
    new, other = quantize(model()), quantize(LanguageModel(61, 32, LAYERS, pad_vocab_size_multiple=8).eval())
    save_model(new, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    tokens = torch.randint(61, (1, 4))
    assert torch.equal(new(tokens)[0], other(tokens)[0])
    with pytest.raises(ValueError, match="is quantised"):
        longstate.save(new, tmp_path)


def test_rows_of_nothing() -> None:
    layer = nn.Linear(5, 2)
    nn.init.zeros_(layer.weight)
    assert torch.equal(quantize(nn.Sequential(layer).eval())[0].weight, torch.zeros(2, 5))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"no such kind.*Did you mean 'int8'"):
        quantize(model(), "int4")
    with pytest.raises(ValueError, match="training mode"):
        quantize(model().train())
    with pytest.raises(ValueError, match="already"):
        quantize(quantize(model()))
    with pytest.raises(ValueError, match="no linear layer"):
        quantize(nn.Sequential(nn.ReLU()).eval())
    with pytest.raises(ValueError, match="group=0"):
        quantize(model(), group=0)
    with pytest.raises(ValueError, match="groups of 20"):
        quantize(model(), group=20)
    bad = model()
    with torch.no_grad():
        bad.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        quantize(bad)
    assert isinstance(bad.lm_head, nn.Linear)
    quantize(bad.float().backbone.layers[0])  # the rest is as it was
    experts = nn.Sequential(Experts(8, 2, 1, 4)).eval()
    quantize(experts)
    with pytest.raises(ValueError, match="already"):
        quantize(experts)
    with pytest.raises(ValueError, match="groups of 3"):
        quantize(nn.Sequential(Experts(8, 2, 1, 4)).eval(), group=3)
