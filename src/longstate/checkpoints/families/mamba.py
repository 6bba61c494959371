"""Mamba as transformers writes it (state-spaces/mamba-130m-hf and others).

Source:
    Gu and Dao, arXiv:2312.00752.
"""

from __future__ import annotations

from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from .._rows import rows
from ._family import Family

ROWS = rows(
    {
        "backbone.embeddings.weight": "backbone.embedding.weight",
        "backbone.layers.{n}.*": "backbone.layers.{n}.*",
        "backbone.norm_f.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
)
MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 50280),
        "d_model": ("hidden_size", 768),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "residual_in_fp32": ("residual_in_fp32", True),
    },
)
MAMBA = Part(
    "mamba",
    {
        "d_state": ("state_size", 16),
        "d_conv": ("conv_kernel", 4),
        "bias": ("use_bias", False),
        "conv_bias": ("use_conv_bias", True),
    },
    other=["expand", "dt_rank"],
)


def read(options: Options, part: Part = MAMBA) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    model = MODEL.read(options)
    layer = {**part.read(options), "expand": _expand(options, model["d_model"]), "dt_rank": rank(options)}
    return {**model, "layers": [layer] * options.layers("num_hidden_layers", 32)}


def rank(options: Options, name: str = "time_step_rank") -> int | None:
    """Return the rank of Δ's projection, which may be a word."""
    return None if options.entries.get(name, "auto") == "auto" else options.need(name, int)


def _expand(options: Options, d_model: int) -> float:
    """Return inner channels over outer ones; ``intermediate_size`` goes before ``expand`` where both stand."""
    inner = options.maybe("intermediate_size", int)
    if inner is None or d_model < 1:
        return options.take("expand", 2)
    ratio = inner / d_model
    return ratio if int(ratio * d_model) == inner else (inner + 0.5) / d_model


def write(model: LanguageModel, part: Part = MAMBA) -> dict[str, Any]:
    """Return theirs."""

    def mixer(settings: Settings) -> dict[str, Any]:
        inner = int(settings.values["expand"] * model.config["d_model"])
        own = {"time_step_rank": settings.values["dt_rank"], "intermediate_size": inner}
        return {**part.write(settings), **own, "expand": max(1, inner // model.config["d_model"])}

    layers, options = write_layers(model, {"mamba": mixer}, {None: None})
    return merged("the model", {**options, "num_hidden_layers": len(layers)}, MODEL.write(model_settings(model)))


FAMILY = Family("mamba", ROWS, read, write, "MambaForCausalLM", (("backbone.embedding.", "backbone.embeddings."),))
