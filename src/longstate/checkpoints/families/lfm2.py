"""LFM2: gated short convolutions and attention with norms of queries and keys, with gated MLPs.

Source:
    Liquid AI, 2025, arXiv:2511.23404; as in transformers.
"""

from __future__ import annotations

from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from .._rows import rows
from ._family import Family
from .bamba import rotary
from .jamba import NO_ATTENTION, heads, write_attention

ROWS = rows(
    {
        "model.embed_tokens.weight": "backbone.embedding.weight",
        "model.embedding_norm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        "operator_norm.weight": "norm.weight",
        "conv.{in_proj|out_proj}.*": "mixer.{in_proj|out_proj}.*",
        "conv.conv.*": "mixer.conv1d.*",
        "self_attn.{q|k|v}_proj.weight": "mixer.{q|k|v}_proj.weight",
        "self_attn.{q|k}_layernorm.weight": "mixer.{q|k}_norm.weight",
        "self_attn.out_proj.weight": "mixer.o_proj.weight",
        "ffn_norm.weight": "norm2.weight",
        "feed_forward.w3.weight + feed_forward.w1.weight": "mlp.fc1.weight",
        "feed_forward.w2.weight": "mlp.fc2.weight",
    },
    "model.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 65536),
        "d_model": ("hidden_size", 2560),
        "norm_eps": ("norm_eps", 1e-5),
    },
    other=["tie_embeddings"],
)
SHORT_CONV = Part("short_conv", {"d_conv": ("conv_L_cache", 3), "bias": ("conv_bias", False)})
ATTENTION = Part(
    "attention",
    {
        "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", 8),
        "norm_eps": ("norm_eps", 1e-5),
    },
    fixed={"qk_norm": True},
    other=["head_dim", "rotary_base"],
)
MLP = Part("gated", {}, other=["hidden"])
WORDS = {"conv": False, "full_attention": True}


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("block_use_swiglu", True)
    options.only("use_pos_enc", True)
    count = options.layers("num_hidden_layers", 32)
    kinds = options.words("layer_types", WORDS)
    if kinds is None:
        given = options.entries.get("full_attn_idxs") is not None
        chosen = options.indices("full_attn_idxs") if given else range(count)
        kinds = [i in chosen for i in range(count)]
    if len(kinds) != count:
        raise ValueError(f"{options.where}: layer_types has {len(kinds)} entries, but num_hidden_layers is {count}")
    mixers = {
        False: SHORT_CONV.read(options),
        True: {**ATTENTION.read(options), **heads(options, 8), "rotary_base": options.rotary_base(1e6)},
    }
    return {
        **MODEL.read(options),
        "tie_embeddings": options.first(("tie_embedding", "tie_word_embeddings"), True),
        "layers": [mixers[kind] for kind in kinds],
        "mlp": {**MLP.read(options), "hidden": _hidden(options)},
    }


def _hidden(options: Options) -> int:
    """Return the inner channels of MLPs: of what is given two thirds, times a factor, rounded up to a multiple."""
    hidden = options.first(("block_ff_dim", "intermediate_size"), 12288)
    if not options.take("block_auto_adjust_ff_dim", True):
        return hidden
    hidden = int(2 * hidden / 3)
    if "block_ffn_dim_multiplier" in options.entries and options.entries["block_ffn_dim_multiplier"] is None:
        return hidden
    multiple = max(1, options.take("block_multiple_of", 256))
    return -(-int(options.take("block_ffn_dim_multiplier", 1.0) * hidden) // multiple) * multiple


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""

    def attention(settings: Settings) -> dict[str, Any]:
        return {**write_attention(ATTENTION, settings), "rope_parameters": rotary(settings, None)}

    def mlp(settings: Settings) -> dict[str, Any]:
        own = {"intermediate_size": settings.values["hidden"], "block_auto_adjust_ff_dim": False}
        return {**MLP.write(settings), **own}

    layers, options = write_layers(model, {"short_conv": SHORT_CONV.write, "attention": attention}, {"gated": mlp})
    kinds = {"short_conv": "conv", "attention": "full_attention"}
    options["layer_types"] = [kinds[x.mixer.kind] for x in layers if x.mixer]
    options["num_hidden_layers"] = len(layers)
    settings = model_settings(model)
    options["tie_word_embeddings"] = settings.values["tie_embeddings"]
    return merged("the model", {**NO_ATTENTION, **options}, MODEL.write(settings))


FAMILY = Family("lfm2", ROWS, read, write, "Lfm2ForCausalLM", ignored=(r".*rotary_emb\.inv_freq",))
