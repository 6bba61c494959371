"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file to write, which then takes the place of ``path`` at one instant.

    Whenever the process dies, the old file or the new one is there, complete. The temporary name is always the same, so
    that what a killed process left is overwritten by the next.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # what a new file may be here; some writers make theirs for the owner alone
        yield part
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
