"""Models that others published: read from their folders, and written as such."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import nearest
from .._files import replacing
from ..models import LanguageModel
from . import families, native
from ._fill import fill, gather
from ._options import Options
from ._tensors import has_weights, open_tensors, read_json
from .families import Family

# What goes with a model without being part of it.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
# What is fetched from a hub: all but weights, then the weights in the order in which they are wanted.
_BESIDE = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHTS = (["model*.safetensors"], ["consolidated.safetensors"])
_PICKLES = ["pytorch_model*.bin"]


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> LanguageModel:
    """Read a published model, or one of ours, from a folder or a hub.

    Every tensor is accounted for before anything is allocated. What keeps its type stays in its file, mapped into
    memory; the rest is copied once: memory never holds more than the model.

    Args:
        source: A folder, or the name of a repository on the Hugging Face hub if there is no such folder.
        device: Where to; the CPU when absent.
        dtype: The type of the parameters; that of the files when absent.
        allow_pickle: Whether weights that torch.save wrote are read, as weights and nothing else.
        revision: Branch, tag or commit, for a hub.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or a file of it is missing.
        ValueError: If a file is damaged, the family is not known, or the model has what we do not compute.
    """
    folder = folder_of(source, revision, allow_pickle)
    family, path, config = recognise(folder, allow_pickle)
    if family is None:
        return native.load(folder, device, dtype)
    reader = open_tensors(folder, family.weights, allow_pickle)
    reader.rename(family.aliases)
    try:
        ours = family.read(Options(str(path), config, len(reader.entries)))
    except (TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{path}: an entry has the wrong kind of value ({error})") from error
    model = native.build(path, ours, reader)
    fill(model, reader, family.rows, family.ignored, device, dtype)
    return model


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    family: str | None = None,
    tokens: Mapping[str, Any] | None = None,
) -> None:
    """Write a model into a folder, each file whole or not at all.

    Args:
        model: A ``LanguageModel``.
        folder: Where to; made if it does not exist.
        family: As transformers reads a family of models, such as "mamba2"; in our own format when absent.
        tokens: Numbers of special tokens that the configuration of a family names, such as ``eos_token_id``.

    Raises:
        ValueError: If the family has no place for an option of the model, it is another kind of model, or
            it is quantised.
    """
    if not isinstance(model, LanguageModel):
        hint = " Give its to_model()." if hasattr(model, "to_model") else ""
        raise ValueError(f"save: a {type(model).__name__} came, wanted a LanguageModel.{hint}")
    quantized = [name for name, x in model.state_dict().items() if x.dtype == torch.int8]
    if quantized:
        raise ValueError(
            f"save: {quantized[0]} is quantised, which no format here has. Save the model that it was made from, and "
            f"quantise that after loading."
        )
    if family is None:
        native.save(model, folder)
        return
    writing = {name: one for name, one in families.FAMILIES.items() if one.write is not None}
    if family not in writing:
        raise ValueError(f"save(family={family!r}): no such family to write.{nearest(family, writing)}")
    chosen = writing[family]
    assert chosen.write is not None
    try:
        config = chosen.write(model)
        tensors = gather(model, chosen.rows)
    except ValueError as error:
        raise ValueError(f"save(family={family!r}): {error}") from error
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    face = {"architectures": [chosen.architecture], "model_type": family, "dtype": dtype}
    vocabulary = config["vocab_size"]
    # Some classes of transformers have defaults beyond a small vocabulary.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **(tokens or {})}
    inside = {name: x if not isinstance(x, int) or x < vocabulary else None for name, x in ids.items()}
    native.write(Path(folder), tensors, {**face, **config, **inside})


def recognise(folder: Path, allow_pickle: bool = False) -> tuple[Family | None, Path, dict[str, Any]]:
    """Return the family of a folder, the file with its options, and these; no family for our own format.

    Raises:
        FileNotFoundError: If there is no configuration.
        ValueError: If the family is not known, or the model is quantised.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder. A model is a folder with a configuration and weights.")
    names = [native.CONFIG, *(family.config for family in families.FAMILIES.values() if family.config != native.CONFIG)]
    here = [name for name in names if (folder / name).exists()]
    if len(here) > 1 and not has_weights(folder, allow_pickle):
        here = here[1:]  # weights of another layout, beside a configuration whose own were not fetched
    if not here:
        raise FileNotFoundError(f"{folder}: no configuration; wanted {' or '.join(names)}")
    path = folder / here[0]
    config = read_json(path, native.LARGEST_CONFIG)
    if native.is_ours(config):
        return None, path, config
    for family in sorted(families.FAMILIES.values(), key=lambda one: bool(one.keys)):  # what says its name goes first
        if family.config == path.name and family.recognises(config):
            _refuse_quantised(path, config)
            return family, path, config
    known = [name for name, family in families.FAMILIES.items() if not family.keys]
    kind = config.get("model_type")
    hint = nearest(kind, known) if isinstance(kind, str) else f" Known: {', '.join(families.FAMILIES)}."
    raise ValueError(f"{path}: model_type {kind!r:.100} is no family that we read.{hint}")


def _refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that speaks of quantisation at any depth."""
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                if re.search(r"quantiz|quantis|^quant", name) and inner:
                    raise ValueError(f"{path}: {name:.100}: quantised weights are not read. Take the original model.")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def check_apart(source: Path, out: str) -> None:
    """Check that a folder is not written over itself.

    Raises:
        ValueError: If it would be.
    """
    if Path(out).resolve() == source.resolve():
        raise ValueError(f"--out {out}: the folder that is read. Write to another one.")


def carry(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation options from one folder to another, and return what was copied.

    Numbers of special tokens that only the source's configuration names are written as generation options.
    """
    copied = []
    for name in COMPANIONS:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            with replacing(target / name) as part:
                shutil.copyfile(source / name, part)
            copied.append(name)
    generation = target / "generation_config.json"
    tokens = special_tokens(source)
    if tokens and not generation.exists():
        with replacing(generation) as part:
            part.write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")
        copied.append(generation.name)
    return copied


def special_tokens(folder: Path) -> dict[str, Any]:
    """Return the numbers of special tokens that a folder's files name."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        content = read_json(folder / name, native.LARGEST_CONFIG) if (folder / name).is_file() else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if content.get(key) is not None:
                found[key] = content[key]
    return found


def folder_of(source: str | os.PathLike[str], revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Return a folder: the source itself, or what a hub has by that name, which is fetched.

    Raises:
        FileNotFoundError: If there is neither.
    """
    folder = Path(source)
    if folder.exists():
        return folder
    name = os.fspath(source)
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", name):
        raise FileNotFoundError(f"{name}: no such folder, and no name of a repository (owner/model) either")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name}: no such folder; to fetch it from a hub, pip install 'longstate[hf]' (huggingface_hub)"
        ) from error
    folder, extra = Path(), ("consolidated.safetensors",)
    try:
        for patterns in (*_WEIGHTS, *([_PICKLES] if allow_pickle else [])):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_BESIDE, *patterns]))
            if has_weights(folder, allow_pickle, extra):
                break
    except Exception as error:  # its classes differ between versions, and all of them mean that it was not fetched
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: no such folder, and not fetched from a hub ({reason:.300})") from error
    return folder
