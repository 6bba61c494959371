"""Falcon-Mamba: Mamba with norms without weights on Δ's input, B and C.

Source:
    Zuo et al., arXiv:2410.05355.
"""

from __future__ import annotations

from functools import partial

from .._parts import Part
from . import mamba
from ._family import Family

MODEL = mamba.MODEL
MAMBA = Part(
    "mamba",
    {**mamba.MAMBA.options, "inner_norm_eps": ("mixer_rms_eps", 1e-6)},
    fixed={"inner_norm": "plain"},
    other=mamba.MAMBA.other,
)

FAMILY = Family(
    "falcon_mamba",
    mamba.ROWS,
    partial(mamba.read, part=MAMBA),
    partial(mamba.write, part=MAMBA),
    "FalconMambaForCausalLM",
    mamba.FAMILY.aliases,
)
