"""RecurrentGemma: Griffin's recurrent blocks and sliding windows of attention, with gated MLPs.

Source:
    De et al., arXiv:2402.19427; Botev et al., arXiv:2404.07839.
"""

from __future__ import annotations

from typing import Any

import torch

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from .._rows import rows
from ._family import Family
from .bamba import rotary

ROWS = rows(
    {
        "model.embed_tokens.weight": "backbone.embedding.weight",
        "model.final_norm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        "temporal_pre_norm.weight": "norm.weight",
        "temporal_block.{linear_x|linear_y|linear_out}.*": "mixer.{linear_x|linear_y|linear_out}.*",
        "temporal_block.conv_1d.*": "mixer.conv1d.*",
        "temporal_block.rg_lru.recurrent_param": "mixer.Lambda",
        "temporal_block.rg_lru.input_gate_{weight|bias}": "mixer.input_gate_{weight|bias}",
        "temporal_block.rg_lru.recurrent_gate_{weight|bias}": "mixer.recurrence_gate_{weight|bias}",
        "temporal_block.{q|k|v|o}_proj.*": "mixer.{q|k|v|o}_proj.*",
        "channel_pre_norm.weight": "norm2.weight",
        "mlp_block.up_proj.* + mlp_block.gate_proj.*": "mlp.fc1.*",
        "mlp_block.down_proj.*": "mlp.fc2.*",
    },
    "model.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 256000),
        "d_model": ("hidden_size", 2560),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", True),
        "logits_soft_cap": ("logits_soft_cap", 30.0),
    },
    fixed={"norm_offset": 1.0},
    other=["embedding_multiplier"],
)
RGLRU = Part("rglru", {"n_heads": ("num_attention_heads", 10), "d_conv": ("conv1d_width", 4)}, other=["d_inner"])
ATTENTION = Part(
    "attention",
    {
        "n_heads": ("num_attention_heads", 10),
        "window": ("attention_window_size", 2048),
        "bias": ("attention_bias", False),
    },
    fixed={"out_bias": True},
    other=["n_kv_heads", "rotary_dim", "rotary_base"],
)
MLP = Part("gated", {}, fixed={"bias": True, "activation": "gelu_tanh"}, other=["hidden"])
WORDS = {"recurrent": "rglru", "attention": "attention"}


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_activation", "gelu_pytorch_tanh")  # of the recurrent block too
    options.only("embeddings_scale_by_sqrt_dim", True)
    model = MODEL.read(options)
    n_heads = max(1, options.take("num_attention_heads", 10))
    mixers = {
        "rglru": {**RGLRU.read(options), "d_inner": options.maybe("lru_width", int)},
        "attention": {
            **ATTENTION.read(options),
            "n_kv_heads": options.maybe("num_key_value_heads", int),
            "rotary_dim": int(model["d_model"] // n_heads * options.rotary_factor(0.5)),
            "rotary_base": options.rotary_base(),
        },
    }
    names = next((name for name in ("block_types", "_block_types") if options.entries.get(name)), "block_types")
    pattern = options.words(names, WORDS) or ["rglru", "rglru", "attention"]
    mlp = {**MLP.read(options), "hidden": options.take("intermediate_size", 7680) // 2}
    count = options.layers("num_hidden_layers", 26)
    layers = [mixers[pattern[i % len(pattern)]] for i in range(count)]
    return {**model, "embedding_multiplier": scale(model["d_model"]), "layers": layers, "mlp": mlp}


def scale(d_model: int) -> float:
    """Return √d_model rounded to bfloat16, as the family multiplies embeddings in every type."""
    return torch.tensor(float(max(0, d_model)) ** 0.5, device="cpu").to(torch.bfloat16).item()


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""

    def attention(settings: Settings) -> dict[str, Any]:
        factor = settings.values["rotary_dim"] / settings.values["head_dim"]
        kv_heads = {"num_key_value_heads": settings.values["n_kv_heads"]}
        return {**ATTENTION.write(settings), **kv_heads, "rope_parameters": rotary(settings, factor)}

    def mlp(settings: Settings) -> dict[str, Any]:
        return {**MLP.write(settings), "intermediate_size": 2 * settings.values["hidden"]}

    layers, options = write_layers(
        model,
        {"rglru": lambda x: {**RGLRU.write(x), "lru_width": x.values["d_inner"]}, "attention": attention},
        {"gated": mlp},
    )
    settings = model_settings(model)
    if settings.values["embedding_multiplier"] != scale(settings.values["d_model"]):
        raise ValueError("the model: embedding_multiplier is not √d_model rounded to bfloat16, as in all the family")
    names = {ours: theirs for theirs, ours in WORDS.items()}
    options["block_types"] = [names[x.mixer.kind] for x in layers if x.mixer]
    return merged("the model", {**options, "num_hidden_layers": len(layers)}, MODEL.write(settings))


FAMILY = Family(
    "recurrent_gemma",
    ROWS,
    read,
    write,
    "RecurrentGemmaForCausalLM",
    ignored=(r".*rotary_emb\.(original_)?inv_freq", r"model\.normalizer"),
)
