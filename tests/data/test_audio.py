"""Spoken digits: archives, the official split, and sounds as rows."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from longstate.data import audio, origins
from longstate.data.audio import joined, padded, read_wave, select, spoken_digits, unpack

HERE = Path(os.environ.get(origins.VARIABLE, "/nowhere")) / "fsdd"


def sound(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FILES = {f"3_ann_{i}.wav": sound(np.arange(-i, 9)) for i in (0, 4, 5, 49)} | {"7_bob_12.wav": sound(np.zeros(3))}


def test_the_official_split() -> None:
    test, train = (select(FILES, part) for part in ("test", "train"))
    assert test.labels.tolist() == [3, 3] and train.labels.tolist() == [3, 3, 7]
    assert train.speakers == ["ann", "ann", "bob"]
    assert [len(x) for x in (*test.waves, *train.waves)] == [9, 13, 14, 58, 3]
    assert test.waves[1].tolist() == [i / 2**15 for i in range(-4, 9)]


def test_recordings_are_found_in_whatever_folder_and_order() -> None:
    bare = unpack(archive({**FILES, "README.md": b"no sound"}))
    deep = unpack(archive({f"set-1.0/recordings/{name}": data for name, data in reversed(FILES.items())}))
    assert joined(bare) == joined(deep) and list(bare) == sorted(FILES)


def test_the_archive_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(origins.VARIABLE, str(tmp_path))
    monkeypatch.setattr(audio, "_DIGEST", hashlib.sha256(joined(dict(sorted(FILES.items())))).hexdigest())
    (tmp_path / "fsdd").mkdir()
    path = tmp_path / "fsdd/recordings.tar.gz"
    path.write_bytes(archive(FILES))
    assert spoken_digits("train").labels.tolist() == [3, 3, 7]
    path.write_bytes(archive({**FILES, "3_ann_0.wav": sound(np.ones(4))}))
    with pytest.raises(ValueError, match="another version, or damaged"):
        spoken_digits("train")
    path.write_bytes(archive(FILES)[:-40])
    with pytest.raises(ValueError, match="damaged"):
        spoken_digits("train")
    with pytest.raises(ValueError, match="there is no such part"):
        spoken_digits("dev")


def test_other_sounds_are_named() -> None:
    with pytest.raises(ValueError, match=r"a.wav: 1 channels of 16 bits at 16000 Hz, wanted 1 channel"):
        read_wave("a.wav", sound(np.zeros(3), 16000))
    with pytest.raises(ValueError, match=r"a.wav: not a wav file"):
        read_wave("a.wav", b"RIFF")


def test_sounds_as_rows() -> None:
    rows, valid = padded([torch.ones(3), torch.ones(5)])
    assert rows.tolist() == valid.float().tolist() == [[1, 1, 1, 0, 0], [1] * 5]


@pytest.mark.skipif(not HERE.is_dir(), reason=f"needs FSDD in the folder that {origins.VARIABLE} names")
def test_the_recordings_themselves() -> None:
    test = spoken_digits("test")
    assert test.labels.bincount().tolist() == [30] * 10 and len(set(test.speakers)) == 6
    assert max(float(x.abs().max()) for x in test.waves) <= 1
