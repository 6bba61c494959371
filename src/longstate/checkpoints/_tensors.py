"""Tensors in files: what is there is known before any of it is read, and is copied only where it must be."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._entry import DTYPES, Entry
from ._pickles import pickled

INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
LARGEST_JSON = 64 * 2**20  # bytes; an index of a hundred thousand tensors takes a fifth of it
CHUNK = 2**20  # numbers that are copied at a time


class Reader:
    """The tensors of a checkpoint by name, seen through maps of the files.

    Attributes:
        entries: What is there, in the order of the files.
        where: The file or index, for messages.
    """

    def __init__(self, where: Path, entries: dict[str, Entry]) -> None:
        self.where, self.entries = where, entries

    def rename(self, aliases: Sequence[tuple[str, str]]) -> None:
        """Give tensors other names: the first alias that fits replaces what a name begins with.

        Raises:
            ValueError: If two become one.
        """
        entries, self.entries = self.entries, {}
        for name, entry in entries.items():
            new = next((after + name[len(before) :] for before, after in aliases if name.startswith(before)), name)
            if new in self.entries:
                raise ValueError(f"{self.where}: two tensors are {new} by different names, one of them {name}")
            self.entries[new] = entry

    def mapped(self, name: str) -> Tensor:
        """Return a tensor where it stands in its file; what is written to it stays in memory."""
        entry = self.entries[name]
        return _map(entry, 0, math.prod(entry.shape)).view(entry.shape)

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, one axis of contiguous numbers, with those of a tensor from number ``start`` on.

        They are looked at piece by piece: pages of a map count as memory until it is let go.
        """
        for i in range(0, len(out), CHUNK):
            piece = out[i : i + CHUNK]
            piece.copy_(_map(self.entries[name], start + i, len(piece)))


def _map(entry: Entry, start: int, count: int) -> Tensor:
    """Return numbers of a tensor as a map of the file, which is let go with the last tensor that lies in it.

    Raises:
        ValueError: If the file has become shorter than it was.
    """
    dtype = DTYPES[entry.dtype]
    if not count:
        return torch.empty(0, dtype=dtype)
    begin, size = entry.begin + start * dtype.itemsize, count * dtype.itemsize
    skipped = begin % mmap.ALLOCATIONGRANULARITY
    with open(entry.file, "rb") as file:
        try:
            window = mmap.mmap(file.fileno(), skipped + size, access=mmap.ACCESS_COPY, offset=begin - skipped)
        except ValueError as error:
            raise ValueError(f"{entry.file}: cut short while it was read ({error})") from error
    numbers = torch.frombuffer(window, dtype=torch.uint8, count=size, offset=skipped)
    # In a file of several types some may not stand where such numbers can be.
    return (numbers.clone() if begin % dtype.itemsize else numbers).view(dtype)


def _joined(where: Path, files: list[Path], entries: Callable[[Path], dict[str, Entry]]) -> Reader:
    """Return what several files have together."""
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in entries(file).items():
            if name in found:
                raise ValueError(f"{where}: {name} is in {found[name].file.name} and in {file.name}")
            found[name] = entry
    return Reader(where, found)


def _safetensors(file: Path) -> dict[str, Entry]:
    """Return what a safetensors file says of its tensors."""
    try:
        with safe_open(file, framework="pt"):  # compares sizes, types and offsets with the file
            pass
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); it may be cut short") from error
    header.pop("__metadata__", None)
    return {
        name: Entry(file, list(x["shape"]), x["dtype"], 8 + length + x["data_offsets"][0]) for name, x in header.items()
    }


def open_tensors(folder: Path, names: tuple[str, ...] = ("model.safetensors",), allow_pickle: bool = False) -> Reader:
    """Look at the headers of a folder's weights.

    Args:
        folder: The folder.
        names: Single files to look for, the first before the others.
        allow_pickle: Whether pytorch_model.bin is read where there are no safetensors.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is damaged.
    """
    for name in names:
        if (folder / name).exists():
            return _joined(folder / name, [_file(folder / name)], _safetensors)
    if (folder / INDEX).exists():
        return _joined(folder / INDEX, _shards(folder / INDEX), _safetensors)
    for name, several in (("pytorch_model.bin", False), (PICKLE_INDEX, True)):
        if (folder / name).exists():
            if not allow_pickle:
                raise ValueError(
                    f"{folder / name}: a pickle, which may run anything when read carelessly. It is read as weights "
                    f"and nothing else with allow_pickle=True (--allow-pickle); safetensors are better."
                )
            files = _shards(folder / name) if several else [_file(folder / name)]
            return _joined(folder / name, files, pickled)
    raise FileNotFoundError(f"{folder}: no weights; wanted {' or '.join((*names, INDEX))}")


def has_weights(folder: Path, allow_pickle: bool, extra: tuple[str, ...] = ()) -> bool:
    """Say whether a folder has weights under one of the names that ``open_tensors`` looks for."""
    names = ("model.safetensors", INDEX, *extra, *(("pytorch_model.bin", PICKLE_INDEX) if allow_pickle else ()))
    return any((folder / name).exists() for name in names)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    return path


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, all beside it."""
    content = read_json(index, LARGEST_JSON)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f'{index}: wanted "weight_map", from names of tensors to names of files')
    shards = sorted(set(files.values()))
    for shard in shards:
        # A name, not a path: an index must not make us read elsewhere.
        if not re.fullmatch(r"[\w.\-]+", shard):
            raise ValueError(f"{index}: {shard!r:.100} is no name of a file in the same folder")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: {len(missing)} of {len(shards)} files are not there: {few(missing)}")
    return [index.parent / shard for shard in shards]


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is too large, damaged, or no object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if _file(path).stat().st_size > largest:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than a configuration has ({largest})")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ValueError(f"{path}: not readable as JSON ({error}); it may be cut short") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, wanted a JSON object")
    return content


def _number(value: dict[str, Any]) -> Any:
    """Return the number that transformers writes as an object, since JSON has no word for it."""
    words = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    word = value.get("__float__")
    return words[word] if len(value) == 1 and isinstance(word, str) and word in words else value


def few(names: Iterable[str]) -> str:
    """Return the first of some names, for a message."""
    names = sorted(names)
    return ", ".join(name[:100] for name in names[:3]) + (", …" if len(names) > 3 else "")
