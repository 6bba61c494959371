"""Published models as ``transformers`` models of ours."""

from __future__ import annotations

import os

import torch
from transformers import GenerationConfig

from .. import checkpoints
from ..checkpoints.published import folder_of
from ..data.tokenizers import stop_tokens
from .model import LongstateForCausalLM


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> LongstateForCausalLM:
    """Read a model of ours or a published one, as ``longstate.load_pretrained`` does, and return it wrapped.

    Args:
        source: A folder, or the name of a repository.
        device: Where to; the CPU when absent.
        dtype: The type of the parameters; that of the files when absent.
        allow_pickle: Whether weights may be unpickled where there are no others.
        revision: Which version of a repository.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged, or not a model that can be computed here.
    """
    folder = folder_of(source, revision, allow_pickle)
    model = checkpoints.load_pretrained(folder, device=device, dtype=dtype, allow_pickle=allow_pickle)
    wrapped = LongstateForCausalLM.from_model(model.eval())
    wrapped.name_or_path = wrapped.config.name_or_path = os.fspath(source)
    if (folder / "generation_config.json").is_file():
        wrapped.generation_config = GenerationConfig.from_pretrained(os.fspath(folder))
    if wrapped.generation_config.eos_token_id is None and (ends := stop_tokens(folder)):
        wrapped.generation_config.eos_token_id = list(ends)
    return wrapped
