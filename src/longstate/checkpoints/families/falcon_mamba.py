"""Falcon-Mamba: Mamba with norms without weights on Δ's input, B and C.

Source:
    Zuo et al., arXiv:2410.05355.
"""

from __future__ import annotations

from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._parts import Part, Settings, merged, model_settings, write_layers
from . import mamba
from ._family import Family

MODEL = mamba.MODEL
MAMBA = Part(
    "mamba",
    {**mamba.MAMBA.options, "inner_norm_eps": ("mixer_rms_eps", 1e-6)},
    fixed={"inner_norm": "plain"},
    other=["dt_rank"],
)


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("hidden_act", "silu", "swish")
    layer = {**MAMBA.read(options), "dt_rank": mamba.rank(options)}
    return {**MODEL.read(options), "layers": [layer] * options.layers("num_hidden_layers", 32)}


def write(model: LanguageModel) -> dict[str, Any]:
    """Return theirs."""
    layers, options = write_layers(model, {"mamba": write_mixer}, {None: None})
    return merged("the model", {**options, "num_hidden_layers": len(layers)}, MODEL.write(model_settings(model)))


def write_mixer(settings: Settings) -> dict[str, Any]:
    """Return their options of a mixer."""
    return {**MAMBA.write(settings), "time_step_rank": settings.values["dt_rank"]}


FAMILY = Family("falcon_mamba", mamba.ROWS, read, write, "FalconMambaForCausalLM", mamba.FAMILY.aliases)
