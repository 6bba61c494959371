"""MNIST, 70,000 handwritten digits, from its IDX files."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .._errors import check_choice
from .._shapes import Int, Shaped, Tensor
from .origins import located

_ORIGIN = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# SHA-256 of the IDX files themselves: how they were compressed differs from copy to copy.
_FILES = {
    "train": {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    },
    "test": {
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}
# The third byte of an IDX file says the type of its entries; MNIST has bytes only.
_UNSIGNED_BYTE = 8


class Images(NamedTuple):
    """Grey pictures and what they show.

    Attributes:
        pixels: Brightness from 0 to 255, as bytes.
        labels: The class of each.
    """

    pixels: Shaped[Tensor, "b height width"]
    labels: Int[Tensor, " b"]


def mnist(part: str) -> Images:
    """Return the 60,000 digits to "train" with, or the 10,000 to "test" with.

    Raises:
        FileNotFoundError: If the files are neither here nor to be had from their origin.
        ValueError: If there is no such part, or a file is damaged.

    Source:
        LeCun et al., 1998.
    """
    check_choice("mnist", "part", part, _FILES)
    pixels, labels = (
        read_idx(located(f"mnist/{name}", _ORIGIN + name, digest, gzip.decompress))
        for name, digest in _FILES[part].items()
    )
    return Images(pixels, labels.long())


def as_sequences(pixels: Shaped[Tensor, "b height width"]) -> Shaped[Tensor, "b t 1"]:
    """Return pictures as sequences of their pixels, row by row, from −1 (black) to 1."""
    return pixels.flatten(1)[..., None] / 127.5 - 1


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Read an array of bytes from an IDX file, which may be compressed with gzip.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file, or cut short.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}). Fetch it anew.") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise ValueError(f"{path}: it begins with {data[:4].hex(' ')}, wanted 00 00 08: not an IDX file of bytes")
    begin = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, begin, 4)]
    if len(data) != begin + math.prod(shape):
        raise ValueError(f"{path}: {len(data)} bytes, wanted {begin + math.prod(shape)} for {shape}. Fetch it anew.")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=begin).reshape(shape).copy())
