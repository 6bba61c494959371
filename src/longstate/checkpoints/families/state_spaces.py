"""The layout of the state-spaces organisation: Mamba and Mamba-2, with attention or MLPs between them.

Source:
    Gu and Dao, arXiv:2312.00752; Dao and Gu, arXiv:2405.21060; options as in their package mamba_ssm.
"""

from __future__ import annotations

import math
from typing import Any

from .._options import Options
from .._parts import Part
from .._rows import rows
from . import mamba
from ._family import Family

ROWS = rows(
    {
        "backbone.embedding.weight": "backbone.embedding.weight",
        "backbone.norm_f.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
) + rows(
    {
        # Attention fuses its projections, and calls the last one as Mamba does.
        "mixer.in_proj.*": "mixer.q_proj.* + mixer.k_proj.* + mixer.v_proj.*",
        "mixer.out_proj.*": "mixer.o_proj.*",
        "*": "*",
    },
    "backbone.layers.{n}.",
    "backbone.layers.{n}.",
)
MODEL = Part(
    "",
    {
        "d_model": ("d_model", 2560),
        "vocab_size": ("vocab_size", 50277),
        "pad_vocab_size_multiple": ("pad_vocab_size_multiple", 8),
        "tie_embeddings": ("tie_embeddings", True),
        "residual_in_fp32": ("residual_in_fp32", True),
    },
)
MAMBA = Part(
    "mamba",
    {
        "d_state": ("d_state", 16),
        "d_conv": ("d_conv", 4),
        "expand": ("expand", 2.0),
        "bias": ("bias", False),
        "conv_bias": ("conv_bias", True),
    },
)
MAMBA2 = Part(
    "mamba2",
    {
        "d_state": ("d_state", 128),
        "d_conv": ("d_conv", 4),
        "expand": ("expand", 2.0),
        "head_dim": ("headdim", 64),
        "n_groups": ("ngroups", 1),
        "bias": ("bias", False),
        "conv_bias": ("conv_bias", True),
        "gated_norm": ("rmsnorm", True),
        "norm_before_gate": ("norm_before_gate", False),
        "skip_per_channel": ("D_has_hdim", False),
    },
)
ATTENTION = Part(
    "attention",
    {
        "n_heads": ("num_heads", 8),
        "bias": ("qkv_proj_bias", True),
        "out_bias": ("out_proj_bias", True),
        "rotary_dim": ("rotary_emb_dim", 0),
        "rotary_base": ("rotary_emb_base", 10000.0),
        "d_conv": ("d_conv", 0),
    },
)


def read(options: Options) -> dict[str, Any]:
    """Return our configuration."""
    options.only("rms_norm", True)
    mixer, attention = (
        Options(f"{options.where}: {name}", options.maybe(name, dict) or {}, options.tensors)
        for name in ("ssm_cfg", "attn_cfg")
    )
    chosen = options.indices("attn_layer_idx")
    layers = [_attention(attention) if i in chosen else _mixer(mixer) for i in range(options.layers("n_layer", 64))]
    inner = options.take("d_intermediate", 0)
    # Rounded up as the package does.
    mlp = {"kind": "gated", "hidden": -(-inner // 128) * 128} if inner else None
    return {**MODEL.read(options), "layers": layers, "mlp": mlp}


def _mixer(options: Options) -> dict[str, Any]:
    options.only("layer", "Mamba1", "Mamba2")
    if options.entries.get("layer", "Mamba1") == "Mamba1":
        return {**MAMBA.read(options), "dt_rank": mamba.rank(options, "dt_rank")}
    return {
        **MAMBA2.read(options),
        "d_ssm": options.maybe("d_ssm", int),
        "dt_limit": options.numbers("dt_limit", (0.0, math.inf)),
    }


def _attention(options: Options) -> dict[str, Any]:
    if not options.take("causal", False):
        raise ValueError(f"{options.where}: causal is not true; attention would look into the future")
    options.only("mlp_dim", 0)
    options.only("rotary_emb_interleaved", False)
    return {
        **ATTENTION.read(options),
        "n_kv_heads": options.maybe("num_heads_kv", int),
        "head_dim": options.maybe("head_dim", int),
        "scale": options.maybe("softmax_scale", float),
    }


FAMILY = Family(
    "state-spaces",
    ROWS,
    read,
    aliases=(("backbone.embeddings.", "backbone.embedding."),),
    keys=frozenset({"d_model", "n_layer"}),
)
