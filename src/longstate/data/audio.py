"""The free spoken digit data set (FSDD): 3,000 recordings of six speakers at 8 kHz."""

from __future__ import annotations

import io
import re
import tarfile
import wave
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .._errors import check_choice
from .._shapes import Bool, Float, Int, Tensor
from .origins import located

RATE = 8000
_ORIGIN = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
# Of all recordings, each as its name and its bytes, in the order of their names.
_DIGEST = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"
_NAME = re.compile(r"(?:.*/)?(?P<name>(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.wav)")
_TEST = 5  # recordings of each speaker and digit that are for testing


class Recordings(NamedTuple):
    """Sounds and what is said.

    Attributes:
        waves: The sound pressure of each, from −1 to 1, at ``RATE`` samples a second; lengths differ.
        labels: The digit that is said.
        speakers: Who says it.
    """

    waves: list[Tensor]
    labels: Int[Tensor, " b"]
    speakers: list[str]


def spoken_digits(part: str) -> Recordings:
    """Return the 2,700 recordings to "train" with, or the 300 (numbers 0 to 4 of each) to "test" with.

    Raises:
        FileNotFoundError: If the archive is neither here nor to be had from its origin.
        ValueError: If there is no such part, or the archive is damaged.

    Source:
        Jackson et al., free-spoken-digit-dataset.
    """
    check_choice("spoken_digits", "part", part, ("train", "test"))
    path = located("fsdd/recordings.tar.gz", _ORIGIN, _DIGEST, lambda data: joined(unpack(data)))
    return select(unpack(path.read_bytes()), part)


def unpack(archive: bytes) -> dict[str, bytes]:
    """Return the recordings in a tar archive by name, in order, whatever folder of it they are in.

    Raises:
        ValueError: If it is no archive.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            found = {
                match["name"]: file.read()
                for member in tar
                if (match := _NAME.fullmatch(member.name)) and (file := tar.extractfile(member)) is not None
            }
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"not a readable tar archive: {error}") from error
    return dict(sorted(found.items()))


def joined(files: Mapping[str, bytes]) -> bytes:
    """Return the names and contents of files as one string of bytes."""
    return b"".join(name.encode() + data for name, data in files.items())


def select(files: Mapping[str, bytes], part: str) -> Recordings:
    """Return the recordings of one part of the official split.

    Raises:
        ValueError: If one is no sound of 16 bits and one channel at 8 kHz.
    """
    waves, labels, speakers = [], [], []
    for name, data in files.items():
        match = _NAME.fullmatch(name)
        if match is not None and (int(match["index"]) < _TEST) == (part == "test"):
            waves.append(read_wave(name, data))
            labels.append(int(match["digit"]))
            speakers.append(match["speaker"])
    return Recordings(waves, torch.tensor(labels, dtype=torch.long), speakers)


def read_wave(name: str, data: bytes) -> Float[Tensor, " t"]:
    """Return the samples of a wav file of 16 bits and one channel at 8 kHz.

    Raises:
        ValueError: If it is not one.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate = file.getparams()[:3]
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name}: not a wav file ({error})") from error
    if (channels, width, rate) != (1, 2, RATE):
        raise ValueError(
            f"{name}: {channels} channels of {8 * width} bits at {rate} Hz, wanted 1 channel of 16 bits at {RATE} Hz"
        )
    return torch.from_numpy(np.frombuffer(frames, "<i2").astype(np.float32) / 2**15)


def padded(waves: Sequence[Tensor]) -> tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Return sounds as rows, with zeros behind the shorter ones, and which of their steps count."""
    lengths = torch.tensor([len(samples) for samples in waves])
    rows = torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    return rows, torch.arange(rows.shape[1]) < lengths[:, None]
