"""Bamba: Mamba-2 and attention with rotary positions on half of each head, with gated MLPs.

Source:
    IBM, Princeton, CMU and UIUC, 2024; as in transformers.
"""

from __future__ import annotations

import math
from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from .._rows import rows
from ._family import Family
from .jamba import NO_ATTENTION, heads, write_attention
from .mamba2 import whole

ROWS = rows(
    {
        "model.embed_tokens.weight": "backbone.embedding.weight",
        "model.final_layernorm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        "input_layernorm.weight": "norm.weight",
        "mamba.{in_proj|conv1d|norm|out_proj}.*": "mixer.{in_proj|conv1d|norm|out_proj}.*",
        "mamba.{dt_bias|A_log|D}": "mixer.{dt_bias|A_log|D}",
        "self_attn.{q|k|v|o}_proj.*": "mixer.{q|k|v|o}_proj.*",
        "pre_ff_layernorm.weight": "norm2.weight",
        "feed_forward.up_proj.* + feed_forward.gate_proj.*": "mlp.fc1.*",
        "feed_forward.down_proj.*": "mlp.fc2.*",
    },
    "model.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 128000),
        "d_model": ("hidden_size", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
)
MAMBA2 = Part(
    "mamba2",
    {
        "d_state": ("mamba_d_state", 256),
        "d_conv": ("mamba_d_conv", 4),
        "n_groups": ("mamba_n_groups", 1),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "bias": ("mamba_proj_bias", False),
        "conv_bias": ("mamba_conv_bias", True),
    },
    other=["expand", "d_inner", "head_dim", "dt_limit"],
)
ATTENTION = Part(
    "attention",
    {
        "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", 8),
        "bias": ("attention_bias", False),
    },
    other=["head_dim", "rotary_base", "rotary_dim"],
)
MLP = Part("gated", {"hidden": ("intermediate_size", 14336), "bias": ("mlp_bias", False)})


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    mixers = {False: read_mamba2(MAMBA2, options), True: _attention(options)}
    chosen = options.indices("attn_layer_indices")
    count = options.layers("num_hidden_layers", 32)
    return {**MODEL.read(options), "layers": [mixers[i in chosen] for i in range(count)], "mlp": MLP.read(options)}


def _attention(options: Options) -> dict[str, Any]:
    found = {**ATTENTION.read(options), **heads(options, 8)}
    width = found["head_dim"] or MODEL.read(options)["d_model"] // max(1, found["n_heads"])
    # Half of it, whatever a configuration says outside rope_parameters.
    inside = Options(options.where, options.maybe("rope_parameters", dict) or {}, 0)
    factor = inside.take("partial_rotary_factor", 0.5)
    return {**found, "rotary_dim": int(width * factor), "rotary_base": options.rotary_base()}


def read_mamba2(part: Part, options: Options) -> dict[str, Any]:
    """Return our options of Mamba-2, whose inner channels are shared among a number of heads."""
    n_heads, expand = options.take("mamba_n_heads", 128), options.take("mamba_expand", 2)
    inner = expand * options.take("hidden_size", 4096)
    if n_heads < 1 or inner % n_heads:
        raise ValueError(
            f"{options.where}: mamba_expand · hidden_size = {inner} do not divide into mamba_n_heads={n_heads}"
        )
    head_dim = inner // n_heads
    options.only("mamba_d_head", "auto", head_dim)
    return {
        **part.read(options),
        "expand": expand,
        "head_dim": head_dim,
        "dt_limit": options.numbers("time_step_limit", (0.0, math.inf)),
    }


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""

    def attention(settings: Settings) -> dict[str, Any]:
        factor = settings.values["rotary_dim"] / settings.values["head_dim"]
        return {**write_attention(ATTENTION, settings), "rope_parameters": rotary(settings, factor)}

    layers, options = write_layers(
        model,
        {"mamba2": lambda settings: write_mamba2(MAMBA2, settings, model), "attention": attention},
        {"gated": MLP.write},
    )
    options["attn_layer_indices"] = [i for i, x in enumerate(layers) if x.mixer and x.mixer.kind == "attention"]
    options["num_hidden_layers"] = len(layers)
    return merged("the model", {**NO_ATTENTION, **NO_MAMBA2, **options}, MODEL.write(model_settings(model)))


# What configurations without Mamba-2 say, so that defaults for larger models do not stand in their way.
NO_MAMBA2 = {"mamba_n_heads": 1, "mamba_d_head": "auto"}


def write_mamba2(part: Part, settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """Return their options of Mamba-2."""
    inner, head_dim = settings.values["d_inner"], settings.values["head_dim"]
    return {
        **part.write(settings),
        "mamba_expand": whole(settings, "d_inner / d_model", inner, model.config["d_model"]),
        "mamba_n_heads": inner // head_dim,
        "mamba_d_head": head_dim,
        "time_step_limit": list(settings.values["dt_limit"]),
    }


def rotary(settings: Settings, factor: float | None) -> dict[str, Any]:
    """Return their options of rotary positions."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": settings.values["rotary_base"]}
    return found if factor is None else {**found, "partial_rotary_factor": factor}


FAMILY = Family("bamba", ROWS, read, write, "BambaForCausalLM", ignored=(r".*rotary_emb\.inv_freq",))
