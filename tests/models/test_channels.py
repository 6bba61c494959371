"""Channel mixers: the formulas, a mixture of experts against a loop over steps and against `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longstate import LanguageModel, Stack
from longstate import state as states
from longstate.models.channels import ACTIVATIONS, MLP, GatedMLP
from longstate.models.experts import Experts

MIXTURES: dict[str, dict[str, Any]] = {
    "softmax": dict(n_experts=5, top_k=2, hidden=6),
    "softmax, normalised, shared": dict(n_experts=4, top_k=3, hidden=6, normalize=True, shared=8),
    "one expert": dict(n_experts=1, top_k=1, hidden=3),
    "sigmoid": dict(n_experts=6, top_k=2, hidden=6, router="sigmoid", normalize=True, scale=2.5),
    "sigmoid, groups, no gates": dict(
        n_experts=8, top_k=3, hidden=5, router="sigmoid", n_groups=4, top_groups=2, gated=False, activation="relu2"
    ),
    "latent": dict(n_experts=4, top_k=2, hidden=6, latent=3, shared=4, bias=True, gated=False, activation="gelu_tanh"),
}
mixtures = pytest.mark.parametrize("options", list(MIXTURES.values()), ids=list(MIXTURES))


def experts(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(3)
    module = Experts(8, **options).to(dtype)
    if module.router_bias is not None:
        module.router_bias.normal_(std=0.3)
    return module


def one_step(module: Experts, x: Tensor) -> Tensor:
    """The definition, for one step, with lists and Python's own sorting."""
    scores = functional.linear(x, module.router.weight)
    if module.router_bias is None:
        weight = scores.softmax(-1)
        choice = weight.tolist()
    else:
        weight = scores.sigmoid()
        choice = (weight + module.router_bias).tolist()
    numbers = range(len(choice))
    size = len(choice) // module.n_groups
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(module.n_groups)]
    best = sorted(range(module.n_groups), key=lambda g: -sum(groups[g][:2]))[: module.top_groups]
    chosen = sorted((e for e in numbers if e // size in best), key=lambda e: -choice[e])[: module.top_k]
    total = sum(weight[e] for e in chosen) if module.normalize else 1
    inside = x if module.latent_in is None else module.latent_in(x)
    y = torch.zeros_like(inside)
    for e in chosen:
        h = module.fc1[e] @ inside
        if module.gated:
            u, gate = h.chunk(2)
            h = u * ACTIVATIONS[module.activation](gate)
        else:
            h = ACTIVATIONS[module.activation](h)
        y = y + module.scale * weight[e] / total * (module.fc2[e] @ h)
    y = y if module.latent_out is None else module.latent_out(y)
    return y if module.shared is None else y + module.shared(x[None, None])[0, 0]


def test_formulas() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gated = GatedMLP(4, 5, bias=True, activation="relu2").double()
    u, gate = functional.linear(x, gated.fc1.weight, gated.fc1.bias).split(5, -1)
    wanted = functional.linear(u * gate.clamp(min=0) ** 2, gated.fc2.weight, gated.fc2.bias)
    torch.testing.assert_close(gated(x), wanted)
    plain = MLP(4, activation="gelu_tanh").double()
    h = functional.linear(x, plain.fc1.weight)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))
    torch.testing.assert_close(plain(x), functional.linear(h / 2 * (1 + tanh), plain.fc2.weight))
    assert plain.fc1.bias is None and plain.fc1.out_features == 16


@mixtures
def test_experts_step_by_step(options: dict[str, Any]) -> None:
    module = experts(options)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    wanted = torch.stack([torch.stack([one_step(module, step) for step in row]) for row in x])
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)
    assert wanted.std() > 1e-3
    assert module(x[:, :0]).shape == (3, 0, 8)


@mixtures
def test_experts_all_at_once(options: dict[str, Any]) -> None:
    """What compiled code runs: every expert on every step."""
    module = experts(options)
    x = torch.randn(11, 8, dtype=torch.float64)
    weight, chosen = module.route(x)
    inside = x if module.latent_in is None else module.latent_in(x)
    sparse, dense = module._sparse(inside, weight, chosen), module._dense(inside, weight, chosen)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)


@mixtures
def test_experts_gradients(options: dict[str, Any]) -> None:
    module = experts(options)
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    parameters = list(module.parameters())

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(module.named_parameters()), weights, strict=True))
        return torch.func.functional_call(module, named, (x,))

    # Small steps: a larger one may choose other experts.
    assert torch.autograd.gradcheck(function, (x, *parameters), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.compiled
@mixtures
def test_experts_compiled(options: dict[str, Any]) -> None:
    module = experts(options, torch.float32)
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def copied(ours: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    missing = ours.load_state_dict(weights, strict=True)
    assert not missing.missing_keys


def test_experts_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import GraniteMoeHybridConfig, JambaConfig, NemotronHConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE
    from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    def drawn(module: torch.nn.Module) -> dict[str, Tensor]:
        for x in module.state_dict().values():
            x.normal_(std=0.4)
        return dict(module.state_dict())

    def swapped(fused: Tensor) -> Tensor:
        gate, up = fused.chunk(2, 1)
        return torch.cat([up, gate], 1)

    x = torch.randn(2, 9, 8)
    sizes = dict(hidden_size=8, intermediate_size=6)
    jamba = JambaSparseMoeBlock(JambaConfig(**sizes, num_experts=5, num_experts_per_tok=2))
    theirs = drawn(jamba)
    ours = Experts(8, 5, 2, 6)
    fc1, fc2 = swapped(theirs["experts.gate_up_proj"]), theirs["experts.down_proj"]
    copied(ours, {"router.weight": theirs["router.weight"], "fc1": fc1, "fc2": fc2})
    torch.testing.assert_close(ours(x), jamba(x), rtol=1e-5, atol=1e-5)

    granite = GraniteMoeHybridMoE(
        GraniteMoeHybridConfig(**sizes, mamba_n_heads=4, num_local_experts=4, num_experts_per_tok=3)
    )
    theirs = drawn(granite)
    ours = Experts(8, 4, 3, 6, normalize=True)
    fc1, fc2 = swapped(theirs["experts.gate_up_proj"]), theirs["experts.down_proj"]
    copied(ours, {"router.weight": theirs["router.weight"], "fc1": fc1, "fc2": fc2})
    torch.testing.assert_close(ours(x), granite(x), rtol=1e-5, atol=1e-5)

    routing = dict(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    widths = dict(moe_intermediate_size=6, moe_shared_expert_intermediate_size=10, moe_latent_size=4)
    nemotron = NemotronHMoE(NemotronHConfig(**sizes, **routing, **widths, layers_block_type=["moe"]))
    theirs = drawn(nemotron)
    ours = Experts(8, 8, 3, 6, "relu2", False, "sigmoid", True, 4, 2, 2.5, shared=10, latent=4)
    names = {
        "router.weight": "gate.weight",
        "router_bias": "gate.e_score_correction_bias",
        "fc1": "experts.up_proj",
        "fc2": "experts.down_proj",
        "latent_in.weight": "fc1_latent_proj.weight",
        "latent_out.weight": "fc2_latent_proj.weight",
        "shared.fc1.weight": "shared_experts.up_proj.weight",
        "shared.fc2.weight": "shared_experts.down_proj.weight",
    }
    copied(ours, {mine: theirs[name] for mine, name in names.items()})
    torch.testing.assert_close(ours(x), nemotron(x), rtol=1e-5, atol=1e-5)


def test_the_correction_stays_in_float32() -> None:
    module = experts(MIXTURES["sigmoid"], torch.float32)
    before = module.router_bias
    assert before is not None
    module.bfloat16()
    assert module.fc1.dtype == torch.bfloat16 and module.router_bias is not None
    assert torch.equal(module.router_bias, before) and module.router_bias.dtype == torch.float32
    assert module(torch.randn(1, 3, 8).bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = Experts(8, **MIXTURES["sigmoid"])
    empty.to_empty(device="cpu").reset_parameters()
    assert empty.router_bias is not None and not empty.router_bias.any()


def test_a_layer_without_a_mixer() -> None:
    layers: list[Any] = ["s5", {"mixer": None, "mlp": {"kind": "plain", "hidden": 6}}, "s5"]
    model = LanguageModel(11, 8, layers).double()
    assert [name for name, _ in model.backbone.layers[1].named_children()] == ["norm2", "mlp"]
    tokens = torch.randint(11, (3, 9))
    whole, after = model(tokens)
    first, state = model(tokens[:, :4])
    assert state[1] == () and after[1] == ()
    order = [2, 0, 1]
    rest, _ = model(tokens[order, 4:], states.select(state, order))
    torch.testing.assert_close(torch.cat([first[order], rest], 1), whole[order])


def test_multipliers_offsets_and_caps() -> None:
    torch.manual_seed(5)
    options: dict[str, Any] = dict(norm_offset=1.0, embedding_multiplier=3.0, residual_multiplier=0.25)
    model = LanguageModel(11, 8, ["s5"], {"hidden": 6}, **options, logits_divisor=2.0, logits_soft_cap=0.5).double()
    for block in model.backbone.layers:
        block.norm.weight.data.normal_()
    tokens = torch.randint(11, (2, 5))
    embedded = model.backbone.embedding(tokens)
    (block,) = model.backbone.layers
    residual = 3 * embedded
    normed = functional.rms_norm(residual, (8,), 1 + block.norm.weight, 1e-5)
    residual = residual + block.mixer(normed)[0] / 4
    residual = residual + block.mlp(functional.rms_norm(residual, (8,), 1 + block.norm2.weight, 1e-5)) / 4
    hidden = functional.rms_norm(residual, (8,), 1 + model.backbone.norm_f.weight, 1e-5)
    wanted = 0.5 * torch.tanh(hidden @ model.lm_head.weight.T / 2 / 0.5)
    torch.testing.assert_close(model(tokens)[0], wanted)
    torch.testing.assert_close(model.logits(model.backbone(embedded)[0]), wanted)


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    sizes = {"kind": "experts", "n_experts": 4, "top_k": 2, "hidden": 6}
    yield {"mlp": {"kind": "gatd"}}, r"mlp\(kind='gatd'\): there is no such kind. Did you mean 'gated'"
    yield {"mlp": {"activation": "silo"}}, r"GatedMLP\(activation='silo'\).* Did you mean 'silu'"
    yield {"mlp": {"kind": "plain", "hidden": 0}}, r"MLP\(hidden=0\): wanted at least one inner channel"
    yield {"mlp": {"kind": "experts", "top_k": 2, "hidden": 3}}, "mlp: n_experts is missing"
    yield {"mlp": {**sizes, "top_k": 5}}, "n_experts at most"
    yield {"mlp": {**sizes, "router": "softmin"}}, "there is no such router. Did you mean 'softmax'"
    yield {"mlp": {**sizes, "router": "sigmoid", "n_groups": 3}}, "groups are of equal size"
    yield {"mlp": {**sizes, "n_groups": 2}}, "only the sigmoid router has groups"
    yield {"mlp": {**sizes, "router": "sigmoid", "n_groups": 2, "top_k": 3}}, "have only 2 experts"
    yield {"layers": [{"mixer": None}]}, r"layers\[0\] = .*a layer without a mixer has an mlp"
    yield {"layers": [{"mixer": None, "mlp": {}, "d_state": 3}]}, "and no other options"
    yield {"layers": [{"mixer": 3}]}, "wanted the name of a mixer"
    yield {"layers": [{"mixer": "s5", "mlp": 3}]}, "no mapping of names to values"
    yield {"logits_soft_cap": 0.0}, "a cap above 0 or None"
    yield {"logits_divisor": 0.0}, "a divisor other than 0"
    yield {"residual_multiplier": "1"}, "residual_multiplier is '1', wanted float"


@pytest.mark.parametrize(("options", "message"), list(wrong()))
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_config({"vocab_size": 7, "d_model": 8, "layers": ["s5"], **options})


def test_branches_of_experts_start_small_too() -> None:
    mlp = {"kind": "experts", "n_experts": 3, "top_k": 1, "hidden": 32, "shared": 32}
    deep, shallow = Stack(32, ["mamba"] * 8, mlp), Stack(32, ["mamba"], mlp)
    for name in ("fc2", "shared.fc2.weight"):
        ratio = deep.layers[0].mlp.get_parameter(name).std() / shallow.layers[0].mlp.get_parameter(name).std()
        assert ratio.item() == pytest.approx(8**-0.5, rel=0.1)
