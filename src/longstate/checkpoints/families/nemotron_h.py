"""Nemotron-H: layers of only Mamba-2, only attention without positions, only an MLP, or only experts.

Source:
    NVIDIA, arXiv:2504.03624; as in transformers.
"""

from __future__ import annotations

import math
from typing import Any

from ...models import LanguageModel
from .._options import THEIR_ACTIVATIONS, Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from .._rows import rows
from ._family import Family
from .jamba import NO_ATTENTION, heads

ROWS = rows(
    {
        "backbone.embeddings.weight": "backbone.embedding.weight",
        "backbone.norm_f.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        "norm.weight": "{norm|norm2}.weight",
        "mixer.{in_proj|conv1d|norm|out_proj}.*": "mixer.{in_proj|conv1d|norm|out_proj}.*",
        "mixer.{dt_bias|A_log|D}": "mixer.{dt_bias|A_log|D}",
        "mixer.{q|k|v|o}_proj.weight": "mixer.{q|k|v|o}_proj.weight",
        "mixer.up_proj.*": "mlp.fc1.*",
        "mixer.down_proj.*": "mlp.fc2.*",
        "mixer.gate.weight": "mlp.router.weight",
        "mixer.gate.e_score_correction_bias": "mlp.router_bias",
        "mixer.shared_experts.up_proj.*": "mlp.shared.fc1.*",
        "mixer.shared_experts.down_proj.*": "mlp.shared.fc2.*",
        "mixer.fc1_latent_proj.*": "mlp.latent_in.*",
        "mixer.fc2_latent_proj.*": "mlp.latent_out.*",
        "mixer.experts.{e}.up_proj.weight": "mlp.fc1",
        "mixer.experts.{e}.down_proj.weight": "mlp.fc2",
        # As transformers has them in memory since 5.0.
        "mixer.experts.up_proj": "mlp.fc1",
        "mixer.experts.down_proj": "mlp.fc2",
    },
    "backbone.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 131072),
        "d_model": ("hidden_size", 4096),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
)
MAMBA2 = Part(
    "mamba2",
    {
        "d_state": ("ssm_state_size", 128),
        "head_dim": ("mamba_head_dim", 64),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "bias": ("use_bias", False),
    },
    other=["expand", "d_inner", "d_conv", "n_groups", "conv_bias", "dt_limit"],
)
ATTENTION = Part(
    "attention",
    {"n_heads": ("num_attention_heads", 32)},
    fixed={"rotary_dim": 0},
    other=["n_kv_heads", "head_dim"],
)
MLP = Part("plain", {"hidden": ("intermediate_size", 21504), "bias": ("mlp_bias", False)}, other=["activation"])
EXPERTS = Part(
    "experts",
    {
        "n_experts": ("n_routed_experts", 8),
        "top_k": ("num_experts_per_tok", 2),
        "hidden": ("moe_intermediate_size", 7688),
        "normalize": ("norm_topk_prob", True),
        "n_groups": ("n_group", 1),
        "top_groups": ("topk_group", 1),
        "scale": ("routed_scaling_factor", 1.0),
        "shared": ("moe_shared_expert_intermediate_size", 7688),
        "bias": ("mlp_bias", False),
    },
    fixed={"router": "sigmoid", "gated": False},
    other=["activation", "latent"],
)
# The letters of hybrid_override_pattern, and the words of layers_block_type, old and new.
KINDS = {
    "M": "mamba2",
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "*": "attention",
    "attention": "attention",
    "full_attention": "attention",
    "-": "plain",
    "mlp": "plain",
    "E": "experts",
    "moe": "experts",
}
WORDS = {"mamba2": "linear_attention", "attention": "full_attention", "plain": "mlp", "experts": "moe"}


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("mamba_hidden_act", "silu", "swish")
    activation = {"activation": options.activation("mlp_hidden_act", "relu2")}
    head_dim = options.first(("head_dim", "attention_head_dim"), 128)
    layers: dict[str, dict[str, Any]] = {
        "mamba2": _mamba2(options),
        "attention": {**ATTENTION.read(options), **heads(options, 8), "head_dim": head_dim},
        "plain": {"mixer": None, "mlp": {**MLP.read(options), **activation}},
        "experts": {
            "mixer": None,
            "mlp": {**EXPERTS.read(options), **activation, "latent": options.maybe("moe_latent_size", int)},
        },
    }
    return {**MODEL.read(options), "layers": [layers[kind] for kind in _kinds(options)]}


def _kinds(options: Options) -> list[str]:
    for name in ("layers_block_type", "layer_types"):
        found = options.words(name, KINDS)
        if found is not None:
            return found
    pattern = options.take("hybrid_override_pattern", "ME*-")
    options.bounded("hybrid_override_pattern", len(pattern))
    if not set(pattern) <= set(KINDS):
        raise ValueError(f"{options.where}: hybrid_override_pattern is {pattern!r:.100}; its letters are M, *, - and E")
    return [KINDS[letter] for letter in pattern]


def _mamba2(options: Options) -> dict[str, Any]:
    return {
        **MAMBA2.read(options),
        "d_inner": options.take("mamba_num_heads", 128) * options.take("mamba_head_dim", 64),
        "d_conv": options.first(("mamba_d_conv", "conv_kernel"), 4),
        "n_groups": options.first(("mamba_n_groups", "n_groups"), 8),
        "conv_bias": options.first(("mamba_conv_bias", "use_conv_bias"), True),
        # As transformers has it: a lower limit, no upper one, and time_step_limit is not looked at. NVIDIA's own
        # modeling_nemotron_h.py, with which the models are published, takes time_step_limit, which is [0, ∞] in all
        # of them: no limit. There time_step_min says only how Δ begins. So these numbers are not NVIDIA's wherever
        # Δ < time_step_min (huggingface/transformers, pull request 48989).
        "dt_limit": [options.first(("mamba_dt_min", "time_step_min"), 0.001), math.inf],
    }


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""
    layers, options = write_layers(
        model,
        {"mamba2": _write_mamba2, "attention": _write_attention, None: None},
        {
            "plain": lambda settings: {**MLP.write(settings), **_activation(settings)},
            "experts": lambda settings: {
                **EXPERTS.write(settings),
                **_activation(settings),
                "moe_latent_size": settings.values["latent"],
            },
            None: None,
        },
    )
    kinds = []
    for layer in layers:
        parts = [part for part in (layer.mixer, layer.mlp) if part is not None]
        if len(parts) != 1:
            raise ValueError(f"{layer.where}: mixer and mlp; a layer of the family has one of them")
        kinds.append(WORDS[parts[0].kind])
    settings = model_settings(model)
    if settings.values["tie_embeddings"]:
        raise ValueError("the model: tie_embeddings is True; the family has only False")
    return merged("the model", {**NO_ATTENTION, **options, "layers_block_type": kinds}, MODEL.write(settings))


def _write_mamba2(settings: Settings) -> dict[str, Any]:
    values = settings.values
    if values["dt_limit"][1] != math.inf:
        raise ValueError(f"{settings.where}: dt_limit is {values['dt_limit']}; the family has no upper limit")
    return {
        **MAMBA2.write(settings),
        "mamba_num_heads": values["d_inner"] // values["head_dim"],
        "conv_kernel": values["d_conv"],
        "n_groups": values["n_groups"],
        "use_conv_bias": values["conv_bias"],
        "time_step_min": float(values["dt_limit"][0]),
    }


def _write_attention(settings: Settings) -> dict[str, Any]:
    sizes = {"num_key_value_heads": settings.values["n_kv_heads"], "head_dim": settings.values["head_dim"]}
    return {**ATTENTION.write(settings), **sizes}


def _activation(settings: Settings) -> dict[str, Any]:
    return {"mlp_hidden_act": THEIR_ACTIVATIONS[settings.values["activation"]]}


FAMILY = Family(
    "nemotron_h",
    ROWS,
    read,
    write,
    "NemotronHForCausalLM",
    aliases=(("model.", "backbone."),),
    ignored=(r"mtp\..*",),
)
