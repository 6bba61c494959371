"""Granite 4 hybrid: Bamba's Mamba-2 and attention, multipliers, and experts beside an MLP that all steps go through.

Source:
    IBM, 2025; as in transformers.
"""

from __future__ import annotations

from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from .._rows import rows
from ._family import Family
from .bamba import NO_MAMBA2, read_mamba2, rotary, write_mamba2
from .jamba import NO_ATTENTION, heads, write_attention

ROWS = rows(
    {
        "model.embed_tokens.weight": "backbone.embedding.weight",
        "model.norm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        "input_layernorm.weight": "norm.weight",
        "mamba.{in_proj|conv1d|norm|out_proj}.*": "mixer.{in_proj|conv1d|norm|out_proj}.*",
        "mamba.{dt_bias|A_log|D}": "mixer.{dt_bias|A_log|D}",
        "self_attn.{q|k|v|o}_proj.*": "mixer.{q|k|v|o}_proj.*",
        "post_attention_layernorm.weight": "norm2.weight",
        # Without experts, the shared MLP is the only one.
        "swapped(shared_mlp.input_linear.weight)": "mlp.{shared.|}fc1.weight",
        "shared_mlp.output_linear.weight": "mlp.{shared.|}fc2.weight",
        "block_sparse_moe.router.layer.weight": "mlp.router.weight",
        "swapped(block_sparse_moe.input_linear.weight)": "mlp.fc1",
        "block_sparse_moe.output_linear.weight": "mlp.fc2",
        # As transformers has them in memory since 5.0.
        "block_sparse_moe.router.weight": "mlp.router.weight",
        "swapped(block_sparse_moe.experts.gate_up_proj)": "mlp.fc1",
        "block_sparse_moe.experts.down_proj": "mlp.fc2",
    },
    "model.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 32000),
        "d_model": ("hidden_size", 4096),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "embedding_multiplier": ("embedding_multiplier", 1.0),
        "residual_multiplier": ("residual_multiplier", 1.0),
        "logits_divisor": ("logits_scaling", 1.0),
    },
)
MAMBA2 = Part(
    "mamba2",
    {
        "d_state": ("mamba_d_state", 256),
        "d_conv": ("mamba_d_conv", 4),
        "n_groups": ("mamba_n_groups", 1),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "bias": ("mamba_proj_bias", False),
        "conv_bias": ("mamba_conv_bias", True),
    },
    other=["expand", "d_inner", "head_dim", "dt_limit"],
)
ATTENTION = Part(
    "attention",
    {
        "n_heads": ("num_attention_heads", 32),
        "bias": ("attention_bias", False),
        "scale": ("attention_multiplier", 1.0),
    },
    other=["n_kv_heads", "head_dim", "rotary_base", "rotary_dim"],
)
MLP = Part("gated", {"hidden": ("shared_intermediate_size", 1024)})
EXPERTS = Part(
    "experts",
    {
        "n_experts": ("num_local_experts", 8),
        "top_k": ("num_experts_per_tok", 2),
        "hidden": ("intermediate_size", 11008),
        "shared": ("shared_intermediate_size", 1024),
    },
    fixed={"normalize": True},
)
WORDS = {"mamba": False, "linear_attention": False, "attention": True, "full_attention": True}


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    options.only("position_embedding_type", None, "nope", "rope")
    options.only("normalization_function", "rmsnorm")
    positions: dict[str, Any] = {"rotary_dim": 0}
    if options.entries.get("position_embedding_type") == "rope":
        positions = {"rotary_base": options.rotary_base()}
    mixers = {
        False: read_mamba2(MAMBA2, options),
        True: {**ATTENTION.read(options), **heads(options, None), **positions},
    }
    count = options.layers("num_hidden_layers", 32)
    names = next((name for name in ("layer_types", "layers_block_type") if options.entries.get(name)), "layer_types")
    kinds = options.words(names, WORDS) or [False] * count
    if len(kinds) != count:
        raise ValueError(f"{options.where}: {names} has {len(kinds)} entries, but num_hidden_layers is {count}")
    mlp = (EXPERTS if options.take("num_local_experts", 8) > 0 else MLP).read(options)
    return {**MODEL.read(options), "layers": [mixers[kind] for kind in kinds], "mlp": mlp}


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""

    def attention(settings: Settings) -> dict[str, Any]:
        rotated = settings.values["rotary_dim"]
        if rotated not in (0, settings.values["head_dim"]):
            raise ValueError(f"{settings.where}: rotary_dim is {rotated}; the family rotates whole heads or none")
        return {
            **write_attention(ATTENTION, settings),
            "num_key_value_heads": settings.values["n_kv_heads"],
            "position_embedding_type": "rope" if rotated else None,
            "rope_parameters": rotary(settings, None),
        }

    layers, options = write_layers(
        model,
        {"mamba2": lambda settings: write_mamba2(MAMBA2, settings, model), "attention": attention},
        {"gated": lambda settings: {**MLP.write(settings), "num_local_experts": 0}, "experts": EXPERTS.write},
    )
    kinds = {"mamba2": "linear_attention", "attention": "full_attention"}
    options["layer_types"] = [kinds[x.mixer.kind] for x in layers if x.mixer]
    options["num_hidden_layers"] = len(layers)
    return merged("the model", {**NO_ATTENTION, **NO_MAMBA2, **options}, MODEL.write(model_settings(model)))


FAMILY = Family(
    "granitemoehybrid", ROWS, read, write, "GraniteMoeHybridForCausalLM", ignored=(r".*rotary_emb\.inv_freq",)
)
