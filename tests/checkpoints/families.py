"""Random small models of every family, as transformers builds and writes them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

Draw = random.Random
# What a family's class in transformers is, and how its small configurations are drawn.
FAMILIES: dict[str, tuple[str, Callable[[Draw], dict[str, Any]]]] = {}


def family(name: str, architecture: str) -> Callable[[Callable[[Draw], dict[str, Any]]], Any]:
    def register(function: Callable[[Draw], dict[str, Any]]) -> Callable[[Draw], dict[str, Any]]:
        FAMILIES[name] = (architecture, function)
        return function

    return register


def common(draw: Draw) -> dict[str, Any]:
    return dict(
        vocab_size=draw.choice([17, 33, 50]),
        tie_word_embeddings=draw.random() < 0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def limit(draw: Draw) -> tuple[float, float]:
    return draw.choice([(0.0, float("inf")), (0.01, 0.4), (0.2, float("inf"))])


@family("mamba", "MambaForCausalLM")
def mamba(draw: Draw) -> dict[str, Any]:
    inner = draw.choice([{}, {}, {"intermediate_size": draw.choice([9, 20, 47])}])  # goes before expand
    return (
        common(draw)
        | inner
        | dict(
            hidden_size=draw.choice([8, 20, 33]),
            num_hidden_layers=draw.choice([1, 2, 3]),
            state_size=draw.choice([1, 4, 7, 16]),
            conv_kernel=draw.choice([1, 2, 3, 4]),
            expand=draw.choice([1, 2, 3]),
            time_step_rank=draw.choice(["auto", 1, 5]),
            use_bias=draw.random() < 0.5,
            use_conv_bias=draw.random() < 0.5,
            layer_norm_epsilon=draw.choice([1e-5, 1e-3]),
            residual_in_fp32=draw.random() < 0.5,
        )
    )


@family("falcon_mamba", "FalconMambaForCausalLM")
def falcon_mamba(draw: Draw) -> dict[str, Any]:
    return mamba(draw) | dict(mixer_rms_eps=draw.choice([1e-6, 1e-2]))


@family("mamba2", "Mamba2ForCausalLM")
def mamba2(draw: Draw) -> dict[str, Any]:
    groups = draw.choice([1, 2, 3])
    heads, head_dim, expand = groups * draw.choice([1, 2]) * 2, draw.choice([3, 4, 8]), draw.choice([1, 2])
    return common(draw) | dict(
        hidden_size=heads * head_dim // expand,
        num_hidden_layers=draw.choice([1, 2, 3]),
        num_heads=heads,
        head_dim=head_dim,
        expand=expand,
        n_groups=groups,
        state_size=draw.choice([1, 4, 7, 16]),
        conv_kernel=draw.choice([1, 2, 3, 4]),
        use_bias=draw.random() < 0.5,
        use_conv_bias=draw.random() < 0.5,
        layer_norm_epsilon=draw.choice([1e-5, 1e-3]),
        time_step_limit=limit(draw),
        chunk_size=draw.choice([4, 8]),
    )


def attention(draw: Draw, head_dims: tuple[int, ...]) -> dict[str, Any]:
    kv_heads = draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2, 3])
    return dict(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * draw.choice(head_dims),
    )


@family("jamba", "JambaForCausalLM")
def jamba(draw: Draw) -> dict[str, Any]:
    period, expert_period = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    experts = draw.choice([1, 2, 4])
    return (
        common(draw)
        | attention(draw, (3, 4, 8))
        | dict(
            num_hidden_layers=draw.choice([2, 3, 4]),
            intermediate_size=draw.choice([5, 12]),
            rms_norm_eps=draw.choice([1e-6, 1e-3]),
            num_experts=experts,
            num_experts_per_tok=draw.randint(1, min(2, experts)),
            attn_layer_period=period,
            attn_layer_offset=draw.randrange(period),
            expert_layer_period=expert_period,
            expert_layer_offset=draw.randrange(expert_period),
            mamba_d_state=draw.choice([1, 4, 7]),
            mamba_d_conv=draw.choice([2, 4]),
            mamba_expand=draw.choice([1, 2]),
            mamba_dt_rank=draw.choice(["auto", 1, 5]),
            mamba_conv_bias=draw.random() < 0.5,
            mamba_proj_bias=draw.random() < 0.5,
        )
    )


def bamba_mixer(draw: Draw, hidden: int) -> dict[str, Any]:
    expand = draw.choice([1, 2])
    groups = draw.choice([1, 2])
    heads = groups * draw.choice([h for h in (1, 2, 3, 4) if expand * hidden % (groups * h) == 0] or [1])
    if expand * hidden % heads:
        groups = heads = 1
    return dict(
        mamba_n_heads=heads,
        mamba_n_groups=groups,
        mamba_d_head=draw.choice(["auto", expand * hidden // heads]),
        mamba_d_state=draw.choice([1, 4, 7]),
        mamba_d_conv=draw.choice([2, 4]),
        mamba_expand=expand,
        mamba_chunk_size=draw.choice([4, 8]),
        mamba_conv_bias=draw.random() < 0.5,
        mamba_proj_bias=draw.random() < 0.5,
        time_step_limit=limit(draw),
    )


@family("bamba", "BambaForCausalLM")
def bamba(draw: Draw) -> dict[str, Any]:
    sizes = attention(draw, (4, 8))
    layers = draw.choice([2, 3, 4])
    return (
        common(draw)
        | sizes
        | bamba_mixer(draw, sizes["hidden_size"])
        | dict(
            num_hidden_layers=layers,
            intermediate_size=draw.choice([5, 12]),
            rms_norm_eps=draw.choice([1e-5, 1e-3]),
            attn_layer_indices=draw.choice([None, [0], [1], list(range(1, layers, 2))]),
            attention_bias=draw.random() < 0.5,
            mlp_bias=draw.random() < 0.5,
            rope_parameters={"rope_type": "default", "rope_theta": draw.choice([10000.0, 100.0])},
        )
    )


@family("granitemoehybrid", "GraniteMoeHybridForCausalLM")
def granite_hybrid(draw: Draw) -> dict[str, Any]:
    sizes = attention(draw, (4, 8))
    experts = draw.choice([0, 2, 5])
    layers = draw.choice([2, 3, 4])
    return (
        common(draw)
        | sizes
        | bamba_mixer(draw, sizes["hidden_size"])
        | dict(
            num_hidden_layers=layers,
            intermediate_size=draw.choice([3, 8]),
            shared_intermediate_size=draw.choice([5, 12]),
            rms_norm_eps=draw.choice([1e-6, 1e-3]),
            layer_types=[
                draw.choice(["mamba", "attention", "linear_attention", "full_attention"]) for _ in range(layers)
            ],
            num_local_experts=experts,
            num_experts_per_tok=draw.randint(1, max(1, min(3, experts))),
            attention_bias=draw.random() < 0.5,
            position_embedding_type=draw.choice([None, "rope"]),
            rope_parameters={"rope_type": "default", "rope_theta": draw.choice([10000.0, 100.0])},
            embedding_multiplier=draw.choice([1.0, 12.0]),
            residual_multiplier=draw.choice([1.0, 0.22]),
            attention_multiplier=draw.choice([1.0, 0.1]),
            logits_scaling=draw.choice([1.0, 3.0]),
        )
    )


@family("nemotron_h", "NemotronHForCausalLM")
def nemotron_h(draw: Draw) -> dict[str, Any]:
    groups, kv_heads = draw.choice([1, 2]), draw.choice([1, 2])
    expert_groups = draw.choice([1, 2])
    experts = expert_groups * draw.choice([2, 3])
    kinds = ["linear_attention", "full_attention", "mlp", "moe"]
    return common(draw) | dict(
        tie_word_embeddings=False,
        hidden_size=draw.choice([8, 15, 24]),
        layers_block_type=draw.sample(kinds, 4) + draw.choices(kinds, k=draw.choice([0, 1])),
        num_attention_heads=kv_heads * draw.choice([1, 3]),
        num_key_value_heads=kv_heads,
        head_dim=draw.choice([3, 4, 8]),
        intermediate_size=draw.choice([5, 12]),
        mlp_hidden_act=draw.choice(["relu2", "relu2", "silu", "gelu"]),
        mlp_bias=draw.random() < 0.5,
        ssm_state_size=draw.choice([1, 4, 7]),
        mamba_num_heads=groups * draw.choice([1, 2]),
        mamba_head_dim=draw.choice([3, 4]),
        n_groups=groups,
        conv_kernel=draw.choice([2, 4]),
        use_conv_bias=draw.random() < 0.5,
        use_bias=draw.random() < 0.5,
        time_step_min=draw.choice([0.001, 0.2]),
        time_step_limit=limit(draw),
        chunk_size=draw.choice([4, 8]),
        layer_norm_epsilon=draw.choice([1e-5, 1e-3]),
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(1, 2),
        n_group=expert_groups,
        topk_group=draw.randint(1, expert_groups),
        norm_topk_prob=draw.random() < 0.5,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        moe_intermediate_size=draw.choice([3, 8]),
        moe_shared_expert_intermediate_size=draw.choice([5, 6]),
        moe_latent_size=draw.choice([None, 6]),
        sliding_window=draw.choice([None, 3]),
    )


@family("recurrent_gemma", "RecurrentGemmaForCausalLM")
def recurrent_gemma(draw: Draw) -> dict[str, Any]:
    sizes = attention(draw, (4, 8))
    heads = sizes["num_attention_heads"]
    kinds = ["recurrent", "attention"]
    return (
        common(draw)
        | sizes
        | dict(
            num_hidden_layers=draw.choice([2, 3, 4]),
            intermediate_size=draw.choice([10, 16]),
            lru_width=draw.choice([None, heads * 5]),
            attention_window_size=draw.choice([2, 5, 100]),
            conv1d_width=draw.choice([2, 4]),
            logits_soft_cap=draw.choice([30.0, 2.0]),
            rms_norm_eps=draw.choice([1e-6, 1e-3]),
            block_types=[draw.choice(kinds) for _ in range(draw.choice([2, 3]))],
            attention_bias=draw.random() < 0.5,
            rope_parameters={"rope_type": "default", "rope_theta": draw.choice([10000.0, 100.0])},
        )
    )


@family("lfm2", "Lfm2ForCausalLM")
def lfm2(draw: Draw) -> dict[str, Any]:
    layers = draw.choice([2, 3, 4])
    listed = {"layer_types": [draw.choice(["conv", "full_attention"]) for _ in range(layers)]}
    return (
        common(draw)
        | attention(draw, (4, 8))
        | draw.choice([listed, {"full_attn_idxs": [1]}, {}])
        | dict(
            num_hidden_layers=layers,
            intermediate_size=draw.choice([10, 25]),
            norm_eps=draw.choice([1e-5, 1e-3]),
            conv_bias=draw.random() < 0.5,
            conv_L_cache=draw.choice([2, 3, 4]),
            block_multiple_of=draw.choice([4, 7]),
            block_ffn_dim_multiplier=draw.choice([1.0, 1.3]),
            block_auto_adjust_ff_dim=draw.random() < 0.5,
            rope_parameters={"rope_type": "default", "rope_theta": draw.choice([1e6, 100.0])},
        )
    )


def build(name: str, seed: int) -> PreTrainedModel:
    """Build a random model of a family, every tensor of it off its initial value."""
    architecture, function = FAMILIES[name]
    draw = Draw(f"{name} {seed}")
    torch.manual_seed(draw.randrange(2**31))
    cls = getattr(transformers, architecture)
    return randomise(cls(cls.config_class(**function(draw))))


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Move every tensor of a model off its initial value."""
    with torch.no_grad():
        for key, x in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key or "normalizer" in key:
                continue
            small = x.ndim < 2 or key.endswith("A_log")
            x.add_(torch.randn_like(x) * (0.3 if small else 0.5 * x.shape[-1] ** -0.5))
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the default wants sizes that are multiples of 4
    return model.eval()


def write(name: str, seed: int, folder: Path) -> PreTrainedModel:
    """Build a random model and let transformers write it."""
    model = build(name, seed)
    model.save_pretrained(folder)
    return model


def opened(name: str, folder: Path) -> PreTrainedModel:
    """Let transformers open a folder."""
    model = getattr(transformers, FAMILIES[name][0]).from_pretrained(folder)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return what transformers computes without a cache, which is wrong in some of its models."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
