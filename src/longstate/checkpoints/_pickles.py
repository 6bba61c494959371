"""Weights that torch.save wrote: read as weights and nothing else, from where they stand in the file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._entry import DTYPES, Entry

_NAMES = {str(dtype): name for name, dtype in DTYPES.items()}


def pickled(file: Path) -> dict[str, Entry]:
    """Return the tensors of a file without reading their numbers.

    Raises:
        ValueError: If it holds anything else, or is damaged.
    """
    tensors = _unpickled(file)
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise ValueError(f"{file}: holds {name!r:.100}, a {type(x).__name__}; wanted tensors by name")
        if x.layout != torch.strided or x.device.type != "cpu" or not x.is_contiguous():
            raise ValueError(f"{file}: {name:.100} is no plain tensor")
    base = _base(file, list(tensors.values()))
    return {
        name: Entry(file, list(x.shape), _NAMES.get(str(x.dtype), str(x.dtype)), x.data_ptr() - base)
        for name, x in tensors.items()
    }


def _unpickled(file: Path) -> dict[Any, Any]:
    try:
        # Mapped, so that no number is read. Every class but tensors and plain containers is refused.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    except Exception as error:  # whatever a damaged pickle may lead to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: not readable as weights and nothing else ({reason:.200})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, wanted tensors by name")
    return content


def _base(file: Path, tensors: list[Tensor]) -> int:
    """Return where in memory the map of the file begins.

    Such a file is a zip archive with one record, not compressed, for each storage. The tensors lie in the map as the
    records lie in the file; which is which follows from their distances.

    Raises:
        ValueError: If they do not lie so.
    """
    sizes: dict[int, int] = {}
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as content:
            for record in archive.infolist():
                content.seek(record.header_offset + 26)
                name, extra = (int.from_bytes(content.read(2), "little") for _ in range(2))
                if record.compress_type == zipfile.ZIP_STORED:
                    sizes[record.header_offset + 30 + name + extra] = record.file_size
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{file}: not an archive as torch.save writes it ({error})") from error
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}
    if not storages:
        return 0
    first = min(storages)
    for begin in sizes:
        base = first - begin
        if all(sizes.get(pointer - base, -1) >= length for pointer, length in storages.items()):
            return base
    raise ValueError(f"{file}: tensors do not lie in the file as torch.save writes them")
