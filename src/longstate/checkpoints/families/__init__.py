"""Families of published models: one file each, readable as a table."""

from __future__ import annotations

from ._family import Family as Family

FAMILIES: dict[str, Family]


def __getattr__(name: str) -> dict[str, Family]:
    """Read the tables when they are first asked for: a tenth of what the package would import otherwise."""
    if name != "FAMILIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
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

    found = {
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
    globals()[name] = found
    return found
