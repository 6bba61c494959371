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
        "expand": ("expand", 2),
        "bias": ("use_bias", False),
        "conv_bias": ("use_conv_bias", True),
    },
    other=["dt_rank"],
)


def rank(options: Options, name: str = "time_step_rank") -> int | None:
    """Return the rank of Δ's projection, which may be a word."""
    return None if options.entries.get(name, "auto") == "auto" else options.need(name, int)


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    layer = {**MAMBA.read(options), "dt_rank": rank(options)}
    return {**MODEL.read(options), "layers": [layer] * options.layers("num_hidden_layers", 32)}


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""
    layers, options = write_layers(model, {"mamba": write_mixer}, {None: None})
    return merged("the model", {**options, "num_hidden_layers": len(layers)}, MODEL.write(model_settings(model)))


def write_mixer(settings: Settings) -> dict[str, Any]:
    """Return their options of a mixer."""
    return {**MAMBA.write(settings), "time_step_rank": settings.values["dt_rank"]}


FAMILY = Family("mamba", ROWS, read, write, "MambaForCausalLM", (("backbone.embedding.", "backbone.embeddings."),))
