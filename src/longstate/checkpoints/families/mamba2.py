"""Mamba-2 as transformers writes it (mistralai/Mamba-Codestral-7B-v0.1 and others).

Source:
    Dao and Gu, arXiv:2405.21060.
"""

from __future__ import annotations

import math
from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from . import mamba
from ._family import Family

MODEL = Part(
    "",
    {
        "vocab_size": ("vocab_size", 32768),
        "d_model": ("hidden_size", 4096),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "residual_in_fp32": ("residual_in_fp32", True),
    },
)
MAMBA2 = Part(
    "mamba2",
    {
        "d_state": ("state_size", 128),
        "d_conv": ("conv_kernel", 4),
        "head_dim": ("head_dim", 64),
        "n_groups": ("n_groups", 8),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "bias": ("use_bias", False),
        "conv_bias": ("use_conv_bias", True),
    },
    other=["expand", "d_inner", "dt_limit"],
)


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    layer = {
        **MAMBA2.read(options),
        "d_inner": options.take("num_heads", 128) * options.take("head_dim", 64),
        "dt_limit": options.numbers("time_step_limit", (0.0, math.inf)),
    }
    return {**MODEL.read(options), "layers": [layer] * options.layers("num_hidden_layers", 64)}


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""

    def mixer(settings: Settings) -> dict[str, Any]:
        inner, width = settings.values["d_inner"], model.config["d_model"]
        return {
            **MAMBA2.write(settings),
            "expand": whole(settings, "d_inner / d_model", inner, width),
            "num_heads": inner // settings.values["head_dim"],
            "time_step_limit": list(settings.values["dt_limit"]),
        }

    layers, options = write_layers(model, {"mamba2": mixer}, {None: None})
    return merged("the model", {**options, "num_hidden_layers": len(layers)}, MODEL.write(model_settings(model)))


def whole(settings: Settings, name: str, one: int, other: int) -> int:
    """Return a ratio that the family keeps as a whole number.

    Raises:
        ValueError: If it is none.
    """
    if one % other:
        raise ValueError(f"{settings.where}: {name} is {one / other}; the family has whole numbers only")
    return one // other


FAMILY = Family("mamba2", mamba.ROWS, read, write, "Mamba2ForCausalLM", mamba.FAMILY.aliases)
