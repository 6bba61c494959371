"""Jamba: Mamba with norms inside, attention without positions, and experts.

Source:
    Lieber et al., arXiv:2403.19887.
"""

from __future__ import annotations

from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, period, write_layers
from .._rows import rows
from . import mamba
from ._family import Family

ROWS = rows(
    {
        "model.embed_tokens.weight": "backbone.embedding.weight",
        "model.final_layernorm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        "input_layernorm.weight": "norm.weight",
        "mamba.{in_proj|conv1d|x_proj|dt_proj|out_proj}.*": "mixer.{in_proj|conv1d|x_proj|dt_proj|out_proj}.*",
        "mamba.{A_log|D}": "mixer.{A_log|D}",
        "mamba.dt_layernorm.weight": "mixer.dt_norm.weight",
        "mamba.b_layernorm.weight": "mixer.B_norm.weight",
        "mamba.c_layernorm.weight": "mixer.C_norm.weight",
        "self_attn.{q|k|v|o}_proj.weight": "mixer.{q|k|v|o}_proj.weight",
        "pre_ff_layernorm.weight": "norm2.weight",
        "feed_forward.up_proj.weight + feed_forward.gate_proj.weight": "mlp.fc1.weight",
        "feed_forward.down_proj.weight": "mlp.fc2.weight",
        "feed_forward.router.weight": "mlp.router.weight",
        "feed_forward.experts.{e}.up_proj.weight + feed_forward.experts.{e}.gate_proj.weight": "mlp.fc1",
        "feed_forward.experts.{e}.down_proj.weight": "mlp.fc2",
        "swapped(feed_forward.experts.gate_up_proj)": "mlp.fc1",
        "feed_forward.experts.down_proj": "mlp.fc2",
    },
    "model.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 65536),
        "d_model": ("hidden_size", 4096),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
)
MAMBA = Part(
    "mamba",
    {
        "d_state": ("mamba_d_state", 16),
        "d_conv": ("mamba_d_conv", 4),
        "expand": ("mamba_expand", 2),
        "bias": ("mamba_proj_bias", False),
        "conv_bias": ("mamba_conv_bias", True),
        "inner_norm_eps": ("rms_norm_eps", 1e-6),
    },
    fixed={"inner_norm": "weighted"},
    other=["dt_rank"],
)
ATTENTION = Part(
    "attention",
    {"n_heads": ("num_attention_heads", 32), "n_kv_heads": ("num_key_value_heads", 8)},
    fixed={"rotary_dim": 0},
    other=["head_dim"],
)
MLP = Part("gated", {"hidden": ("intermediate_size", 14336)})
EXPERTS = Part(
    "experts",
    {
        "n_experts": ("num_experts", 16),
        "top_k": ("num_experts_per_tok", 2),
        "hidden": ("intermediate_size", 14336),
    },
)


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    options.only("mamba_inner_layernorms", True)
    mixers = {
        False: {**MAMBA.read(options), "dt_rank": mamba.rank(options, "mamba_dt_rank")},
        True: {**ATTENTION.read(options), **heads(options, 8)},
    }
    mlps = {False: MLP.read(options), True: EXPERTS.read(options)}
    attention = every(options, "attn_layer", 8, 4)
    experts = every(options, "expert_layer", 2, 1)
    several = options.take("num_experts", 16) > 1
    layers = [
        {**mixers[attention(i)], "mlp": mlps[several and experts(i)]}
        for i in range(options.layers("num_hidden_layers", 32))
    ]
    return {**MODEL.read(options), "layers": layers}


def every(options: Options, name: str, size: int, offset: int) -> Any:
    """Return which layers are chosen by a period and an offset."""
    size, offset = options.take(f"{name}_period", size), options.take(f"{name}_offset", offset)
    if size < 1:
        raise ValueError(f"{options.where}: {name}_period is {size}, wanted at least 1")
    return lambda i: i % size == offset


def heads(options: Options, kv_heads: int | None) -> dict[str, Any]:
    """Return the sizes of heads: null means as many of keys as of queries, and the width shared among them."""
    given = "num_key_value_heads" in options.entries
    found = options.maybe("num_key_value_heads", int) if given else kv_heads
    return {"n_kv_heads": found, "head_dim": options.maybe("head_dim", int)}


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""

    def mixer(settings: Settings) -> dict[str, Any]:
        return {**MAMBA.write(settings), "mamba_dt_rank": settings.values["dt_rank"]}

    layers, options = write_layers(
        model,
        {"mamba": mixer, "attention": lambda settings: write_attention(ATTENTION, settings)},
        {"gated": MLP.write, "experts": EXPERTS.write},
    )
    attention = period("attention", (x.mixer is not None and x.mixer.kind == "attention" for x in layers))
    experts = period("experts", (x.mlp is not None and x.mlp.kind == "experts" for x in layers))
    if not any(x.mlp is not None and x.mlp.kind == "experts" for x in layers):
        options["num_experts"] = 1
    options |= dict(zip(("attn_layer_period", "attn_layer_offset"), attention, strict=True))
    options |= dict(zip(("expert_layer_period", "expert_layer_offset"), experts, strict=True))
    options["num_hidden_layers"] = len(layers)
    return merged("the model", {**NO_ATTENTION, **options}, MODEL.write(model_settings(model)))


# What configurations without attention say, so that defaults for larger models do not stand in their way.
NO_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1}


def write_attention(part: Part, settings: Settings) -> dict[str, Any]:
    """Return their options of attention; the width of a head only where it does not follow."""
    written = part.write(settings)
    if settings.values["head_dim"] != settings.usual["head_dim"]:
        written["head_dim"] = settings.values["head_dim"]
    return written


FAMILY = Family("jamba", ROWS, read, write, "JambaForCausalLM")
