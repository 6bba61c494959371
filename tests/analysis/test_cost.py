"""The cost of a token, against a count by hand."""

from __future__ import annotations

from longstate.analysis.cost import token_cost
from longstate.models import LanguageModel


def test_a_mamba2_layer() -> None:
    mixer = {"mixer": "mamba2", "d_state": 16, "head_dim": 8, "d_conv": 4}
    embedding, layer, head = token_cost(LanguageModel(50, 32, [mixer]), context=10)
    # 64 inner channels in 8 heads; z, x, B, C and Δ come from one product.
    projected = 64 + (64 + 16 + 16) + 8
    numbers = 32 * projected + 64 * 32 + 4 * 96
    assert layer.flops == 2 * numbers + 5 * 64 * 16
    assert layer.state_bytes == 4 * (3 * 96 + 64 * 16)
    assert layer.parameters == numbers + 96 + 3 * 8 + 64 + 32
    assert layer.bytes_moved == 4 * layer.parameters + 2 * layer.state_bytes
    assert (embedding.parameters, embedding.bytes_moved) == (50 * 32, 32 * 4)
    assert (head.parameters, head.flops, head.bytes_moved) == (32, 2 * 50 * 32, 4 * (50 * 32 + 32))


def test_an_attention_layer_costs_more_the_more_it_has_read() -> None:
    model = LanguageModel(50, 32, [{"mixer": "attention", "n_heads": 4, "n_kv_heads": 2}], tie_embeddings=False)
    short, long = (token_cost(model, context)[1] for context in (10, 30))
    # 32 channels of all heads, each position a product and a sum for the score and for the value.
    assert long.flops - short.flops == 20 * 4 * 32
    assert long.state_bytes - short.state_bytes == 20 * 2 * 16 * 4
    assert token_cost(model, 10)[2].parameters == 50 * 32 + 32


def test_complex_states_count_as_such() -> None:
    model = LanguageModel(50, 32, [{"mixer": "s4d", "d_state": 8, "output": "identity"}])
    assert token_cost(model, 10)[1].flops == 14 * 32 * 4


def test_experts_that_a_step_passes_by_cost_nothing() -> None:
    mlp = {"kind": "experts", "n_experts": 6, "top_k": 2, "hidden": 16}
    layer = token_cost(LanguageModel(50, 32, [{"mixer": None, "mlp": mlp}]), context=10)[1]
    expert, rest = 3 * 16 * 32, 6 * 32 + 32
    assert layer.name == "0 Experts"
    assert (layer.parameters, layer.state_bytes) == (6 * expert + rest, 0)
    assert layer.bytes_moved == 4 * (2 * expert + rest)
    assert layer.flops == 2 * (2 * expert + 6 * 32)


def test_a_recurrence_without_an_inner_state() -> None:
    layer = token_cost(LanguageModel(50, 32, [{"mixer": "rglru", "n_heads": 4}]), context=10)[1]
    gates = 2 * 32 * 8
    assert layer.flops == 2 * (3 * 32 * 32 + gates + 4 * 32) + 2 * 32
    assert layer.state_bytes == 4 * (3 * 32 + 32) + 1
