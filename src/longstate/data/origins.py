"""Where data sets lie: in a folder of the user's, in the cache, or at their public origin."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from .._files import replacing

VARIABLE = "LONGSTATE_DATA"
_TIMEOUT = 60.0


def located(name: str, url: str, digest: str, content: Callable[[bytes], bytes]) -> Path:
    """Return the path of a data file: in the folder that ``LONGSTATE_DATA`` names, or else fetched from its origin.

    What is fetched lies in ``~/.cache/longstate`` from then on.

    Args:
        name: Path of the file in that folder, such as ``"mnist/train-images-idx3-ubyte.gz"``.
        url: The origin.
        digest: SHA-256, in hexadecimal, of the content.
        content: What of a file's bytes the digest is of: archives of the same files may differ.

    Raises:
        FileNotFoundError: If it is neither here nor to be had from its origin.
        ValueError: If what is there is not that content.
    """
    # It says where files are, never what a program makes of them: the digest is that of the same numbers everywhere.
    folder = os.environ.get(VARIABLE)  # noqa: TID251
    cache = Path.home() / ".cache" / "longstate"
    for place in [Path(folder), cache] if folder else [cache]:
        if (path := place / name).is_file():
            _check(str(path), path.read_bytes(), digest, content)
            return path
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            data = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is neither in the folder that {VARIABLE} names ({folder or 'none'}) nor in {cache}, and {url} "
            f"could not be read ({error}). Put it into a folder as {name}, and let {VARIABLE} name that."
        ) from error
    _check(url, data, digest, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(data)
    return path


def _check(where: str, data: bytes, digest: str, content: Callable[[bytes], bytes]) -> None:
    try:
        found = hashlib.sha256(content(data)).hexdigest()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{where}: damaged ({error}). Remove it and fetch it anew.") from error
    if found != digest:
        raise ValueError(
            f"{where}: its content has SHA-256 {found[:12]}…, wanted {digest[:12]}…: another version, or damaged. "
            f"Remove it and fetch it anew."
        )
