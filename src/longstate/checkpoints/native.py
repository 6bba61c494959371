"""Our own format: a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .._files import replacing
from ..models import LanguageModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = {"format": "longstate", "version": 1, "model": "language"}
LARGEST_CONFIG = 4 * 2**20  # bytes; a thousand layers with every option spelt out take a tenth of it


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write a model into a folder, each file whole or not at all.

    Args:
        model: The model.
        folder: Where to; made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, seen = {}, set()
    for name, parameter in model.state_dict().items():
        if parameter.data_ptr() in seen and name == "lm_head.weight":
            continue  # tied: one copy, under the embedding's name
        seen.add(parameter.data_ptr())
        tensors[name] = parameter.contiguous()
    with replacing(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as part:
        part.write_text(json.dumps({**FORMAT, **model.config}, indent=2) + "\n", encoding="utf-8")


def load(
    folder: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Read a model that ``save`` wrote.

    Names and shapes are compared with the configuration before anything large is allocated.

    Args:
        folder: Where from.
        device: Where to; the CPU when absent.
        dtype: The type of the parameters; that of the file when absent.

    Raises:
        FileNotFoundError: If the folder or one of its files does not exist.
        ValueError: If a file is damaged, or the two do not go together.
    """
    folder = Path(folder)
    for path in (folder, folder / CONFIG, folder / WEIGHTS):
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such {'folder' if path == folder else 'file'}. A model folder has {CONFIG} and {WEIGHTS}."
            )
    config = _read_config(folder / CONFIG)
    tensors = _header(folder / WEIGHTS)
    layers = config.get("layers")
    if isinstance(layers, list) and len(layers) > len(tensors):  # each has one at least; building them takes memory
        raise ValueError(f"{folder / CONFIG}: {len(layers)} layers, but {WEIGHTS} has only {len(tensors)} tensors")
    with torch.device("meta"):
        model = _named_errors(folder / CONFIG, config)
    _check(folder / WEIGHTS, tensors, model)
    with safe_open(folder / WEIGHTS, framework="pt", device=str(device or "cpu")) as file:
        for name in file.keys():
            _assign(model, name, file.get_tensor(name), dtype)
    model._tie()
    return model


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than a configuration has ({LARGEST_CONFIG})")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ValueError(f"{path}: not readable as JSON ({error}); it may be cut short") from error
    if not isinstance(config, dict) or any(config.get(key) != value for key, value in FORMAT.items()):
        wanted = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in FORMAT.items())
        raise ValueError(f"{path}: not a Longstate configuration of this version; wanted {wanted}")
    return {key: value for key, value in config.items() if key not in FORMAT}


def _named_errors(path: Path, config: dict[str, Any]) -> LanguageModel:
    try:
        return LanguageModel.from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Return shape and type of each tensor in a file; opening it compares its size with its header."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (list(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); it may be cut short") from error


def _check(path: Path, tensors: dict[str, tuple[list[int], str]], model: nn.Module) -> None:
    """Compare names and shapes in the file's header with those of the model."""
    wanted = {name: list(x.shape) for name, x in model.state_dict().items()}
    if isinstance(model, LanguageModel) and model.config["tie_embeddings"]:
        wanted.pop("lm_head.weight")
    found = {name: shape for name, (shape, _) in tensors.items()}
    kinds = {name: kind for name, (_, kind) in tensors.items()}
    for title, names in (("missing", set(wanted) - set(found)), ("not part of the model", set(found) - set(wanted))):
        if names:
            few = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(f"{path}: {len(names)} tensors {title}: {few}. The configuration is of another model.")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{path}: {name} has shape {found[name]}, but the configuration wants {shape}")
        if not re.fullmatch(r"B?F\d+", kinds[name]):
            raise ValueError(f"{path}: {name} holds numbers of type {kinds[name]}, wanted a floating-point type")


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Put a tensor in a parameter's place, with the parameter's marks."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    new = nn.Parameter(tensor if dtype is None else tensor.to(dtype))
    new.__dict__.update(old.__dict__)
    setattr(module, leaf, new)
