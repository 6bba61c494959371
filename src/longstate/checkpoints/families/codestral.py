"""Codestral-Mamba as Mistral writes it: params.json and consolidated.safetensors, a Mamba-2 of mamba_ssm inside."""

from __future__ import annotations

from typing import Any

from .._options import Options
from . import state_spaces
from ._family import Family


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("model_type", "mamba")
    inside = {
        "d_model": options.need("dim", int),
        "n_layer": options.need("n_layers", int),
        "vocab_size": options.need("vocab_size", int),
        "ssm_cfg": {"layer": "Mamba2", "ngroups": options.take("n_groups", 8)},
        "rms_norm": options.take("rms_norm", True),
        "residual_in_fp32": options.take("residual_in_fp32", True),
        "pad_vocab_size_multiple": options.take("pad_vocab_size_multiple", 1),
        "tie_embeddings": options.take("tie_embeddings", False),
    }
    return state_spaces.read(Options(options.where, inside, options.tensors))


FAMILY = Family(
    "codestral",
    state_spaces.ROWS,
    read,
    aliases=(("model.backbone.embeddings.", "backbone.embedding."), ("model.", ""), *state_spaces.FAMILY.aliases),
    config="params.json",
    keys=frozenset({"dim", "n_layers"}),
    weights=("consolidated.safetensors", "model.safetensors"),
)
