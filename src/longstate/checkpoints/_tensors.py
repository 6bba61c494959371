"""Tensors in files: what is there is known before any of it is read, and it is read straight to where it belongs."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# As safetensors writes them. Eight-bit floats are quantised: they mean nothing without their scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
LARGEST_JSON = 64 * 2**20  # bytes; an index of a hundred thousand tensors takes a fifth of it
CHUNK = 2**22  # numbers that are converted at a time


class Entry(NamedTuple):
    """One tensor in a file."""

    file: Path
    shape: list[int]
    dtype: str


class Reader(ABC):
    """The tensors of a checkpoint by name. Values are read only inside ``with reader.open():``.

    Attributes:
        entries: What is there, in the order of the files.
        where: The file or index, for messages.
    """

    entries: dict[str, Entry]
    where: Path

    def __init__(self, where: Path) -> None:
        self.where, self.entries = where, {}
        self._stored: dict[str, str] = {}

    def rename(self, aliases: Sequence[tuple[str, str]]) -> None:
        """Give tensors other names: the first alias that fits replaces what a name begins with.

        Raises:
            ValueError: If two become one.
        """
        entries, self.entries = self.entries, {}
        for name, entry in entries.items():
            new = next((after + name[len(before) :] for before, after in aliases if name.startswith(before)), name)
            if new in self.entries:
                raise ValueError(f"{self.where}: {name} and {self._stored[new]} are the same tensor by two names")
            self.entries[new], self._stored[new] = entry, name

    @abstractmethod
    def open(self) -> AbstractContextManager[None]:
        """Return a context within which values can be read."""

    @abstractmethod
    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, one axis of contiguous numbers, with those of a tensor from number ``start`` on."""

    def whole(self, name: str) -> Tensor | None:
        """Return a whole tensor where that takes no copy of it."""
        return None


class Safetensors(Reader):
    """One or several safetensors files, read without a memory map: mapped pages would count until all is read."""

    def __init__(self, where: Path, files: list[Path]) -> None:
        super().__init__(where)
        self._begin: dict[str, int] = {}
        for file in files:
            header, data = _header(file)
            for name, entry in header.items():
                if name in self.entries:
                    raise ValueError(f"{where}: {name} is in {self.entries[name].file.name} and in {file.name}")
                self.entries[name] = Entry(file, list(entry["shape"]), entry["dtype"])
                self._begin[name] = data + entry["data_offsets"][0]
        self._open: dict[Path, BinaryIO] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open all files."""
        with ExitStack() as stack:
            for file in sorted({entry.file for entry in self.entries.values()}):
                self._open[file] = stack.enter_context(open(file, "rb", buffering=0))
            yield
        self._open.clear()

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Read straight into ``out``, or through a small buffer where it is elsewhere or of another type."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        file = self._open[entry.file]
        file.seek(self._begin[self._stored.get(name, name)] + start * dtype.itemsize)
        direct = out.dtype == dtype and out.device.type == "cpu"
        buffer = out if direct else torch.empty(min(CHUNK, len(out)), dtype=dtype)
        for i in range(0, len(out), CHUNK):
            piece = out[i : i + CHUNK]
            read = piece if direct else buffer[: len(piece)]
            view = memoryview(read.view(torch.uint8).numpy())  # type: ignore[arg-type]
            while len(view):
                count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise ValueError(f"{entry.file}: ended in the middle of {name}; it was cut short while it was read")
                view = view[count:]
            if not direct:
                piece.copy_(read)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, and where their bytes begin."""
    try:
        with safe_open(file, framework="pt"):  # compares sizes, types and offsets with the file
            pass
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); it may be cut short") from error
    header.pop("__metadata__", None)
    return header, 8 + length


class Pickles(Reader):
    """Files that torch.save wrote, read without running anything that they say, and mapped into memory."""

    def __init__(self, where: Path, files: list[Path]) -> None:
        super().__init__(where)
        self._tensors: dict[str, Tensor] = {}
        names = {str(dtype): name for name, dtype in DTYPES.items()}
        for file in files:
            for name, x in _unpickled(file).items():
                if not isinstance(name, str) or not isinstance(x, Tensor):
                    raise ValueError(f"{file}: holds {name!r:.100} of {type(x)}; wanted tensors by name")
                if x.layout != torch.strided or x.device.type != "cpu":
                    raise ValueError(f"{file}: {name} is no plain tensor")
                self.entries[name] = Entry(file, list(x.shape), names.get(str(x.dtype), str(x.dtype)))
                self._tensors[name] = x.detach()

    def open(self) -> AbstractContextManager[None]:
        """Do nothing: they are open."""
        return nullcontext()

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Copy from the map."""
        out.copy_(self._tensors[self._stored.get(name, name)].reshape(-1)[start : start + len(out)])

    def whole(self, name: str) -> Tensor | None:
        """Return the mapped tensor itself."""
        x = self._tensors[self._stored.get(name, name)]
        return x if x.is_contiguous() else None


def _unpickled(file: Path) -> dict[Any, Any]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251 (asked for)
        except RuntimeError as error:  # the format before 2020 cannot be mapped
            if "mmap" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 (asked for)
    except Exception as error:  # whatever a damaged pickle may lead to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: not readable as weights and nothing else ({reason:.200})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, wanted tensors by name")
    return content


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
            return Safetensors(folder / name, [_file(folder / name)])
    if (folder / INDEX).exists():
        return Safetensors(folder / INDEX, _shards(folder / INDEX))
    for name, several in (("pytorch_model.bin", False), (PICKLE_INDEX, True)):
        if (folder / name).exists():
            if not allow_pickle:
                raise ValueError(
                    f"{folder / name}: a pickle, which may run anything when read carelessly. It is read as weights "
                    f"and nothing else with allow_pickle=True (--allow-pickle); safetensors are better."
                )
            return Pickles(folder / name, _shards(folder / name) if several else [_file(folder / name)])
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
        if Path(shard).name != shard or not re.fullmatch(r"[\w.\-]+", shard):
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
