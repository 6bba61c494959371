"""Our own format: a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from .._files import replacing
from ..models import LanguageModel
from ._fill import HEAD, fill
from ._rows import rows
from ._tensors import Reader, open_tensors, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = {"format": "longstate", "version": 1, "model": "language"}
# By these, transformers finds the classes of longstate.hf.
FACE = {"model_type": "longstate", "architectures": ["LongstateForCausalLM"]}
# What transformers adds when it writes such a folder; nothing of it changes what is computed.
ADDED = {
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
LARGEST_CONFIG = 4 * 2**20  # bytes; a thousand layers with every option spelt out take a tenth of it
ROWS = rows({"*": "*"})


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write a model into a folder, each file whole or not at all.

    Args:
        model: The model.
        folder: Where to; made if it does not exist.
    """
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    if model.config["tie_embeddings"]:
        tensors.pop(HEAD)  # one copy, under the embedding's name
    write(Path(folder), tensors, {**FORMAT, **FACE, **model.config})


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write tensors and a configuration into a folder, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    for path in (folder, folder / CONFIG):
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such {'folder' if path == folder else 'file'}. A model folder has {CONFIG} and {WEIGHTS}."
            )
    config = _ours(folder / CONFIG)
    reader = open_tensors(folder)
    model = build(folder / CONFIG, config, reader)
    fill(model, reader, ROWS, (), device, dtype)
    return model


def is_ours(config: dict[str, Any]) -> bool:
    """Say whether a configuration is of our own format."""
    return config.get("format") == FORMAT["format"] or config.get("model_type") == FACE["model_type"]


def build(path: Path, config: dict[str, Any], reader: Reader) -> LanguageModel:
    """Build a model on the meta device from a configuration, not larger than the weights could be.

    Raises:
        ValueError: If the configuration makes no sense.
    """
    layers = config.get("layers")
    if isinstance(layers, list) and len(layers) > len(reader.entries):  # each has one; building them takes memory
        raise ValueError(
            f"{path}: {len(layers)} layers, but {reader.where.name} has only {len(reader.entries)} tensors"
        )
    try:
        with torch.device("meta"), _Undrawn():
            return LanguageModel.from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_ELEMENTWISE = {"add", "div", "exp", "expm1", "log", "mul", "neg", "pow", "radd", "rsub", "sqrt", "sub", "truediv"}


class _Undrawn(TorchFunctionMode):
    """Leave initial values out: on the meta device there are none, but asking for them makes torch load its compiler.

    That takes seconds and as much memory as a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place:
            return args[0] if args else kwargs["tensor"]
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if tensors and name.strip("_") in _ELEMENTWISE:
            return max(tensors, key=torch.Tensor.numel)
        if name == "arange" and all(isinstance(x, int) for x in args):
            return torch.empty(len(range(*args)), **kwargs)
        return func(*args, **kwargs)


def _ours(path: Path) -> dict[str, Any]:
    """Return the arguments of the model, without what else stands in the file."""
    config = read_json(path, LARGEST_CONFIG)
    if any(config.get(key) != value for key, value in FORMAT.items()):
        wanted = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in FORMAT.items())
        raise ValueError(f"{path}: not a Longstate configuration of this version; wanted {wanted}")
    beside = {*FORMAT, *FACE, *(ADDED if "transformers_version" in config else ())}
    return {key: value for key, value in config.items() if key not in beside}
