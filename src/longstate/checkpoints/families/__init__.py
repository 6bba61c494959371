"""Families of published models: one file each, readable as a table."""

from __future__ import annotations

from . import (
    bamba,
    codestral,
    falcon_mamba,
    granite_hybrid,
    jamba,
    lfm2,
    mamba,
    mamba2,
    nemotron_h,
    recurrent_gemma,
    state_spaces,
)
from ._family import Family as Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        mamba,
        mamba2,
        state_spaces,
        codestral,
        falcon_mamba,
        jamba,
        bamba,
        granite_hybrid,
        nemotron_h,
        recurrent_gemma,
        lfm2,
    )
}
