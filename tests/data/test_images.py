"""IDX files, and where data sets are looked for."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest
import torch

from longstate.data import images, origins
from longstate.data.images import as_sequences, mnist, read_idx

HERE = Path(os.environ.get(origins.VARIABLE, "/nowhere")) / "mnist"


def idx(pixels: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
    return bytes([0, 0, 8, pixels.ndim]) + sizes + pixels.numpy().tobytes()


def test_idx_files(tmp_path: Path) -> None:
    pixels = torch.randint(256, (3, 2, 5), dtype=torch.uint8)
    (tmp_path / "plain").write_bytes(idx(pixels))
    (tmp_path / "small").write_bytes(gzip.compress(idx(pixels)))
    assert torch.equal(read_idx(tmp_path / "plain"), pixels) and torch.equal(read_idx(tmp_path / "small"), pixels)
    x = as_sequences(pixels)
    assert x.shape == (3, 10, 1) and float(x[1, 7, 0]) == pytest.approx(float(pixels[1, 1, 2]) / 127.5 - 1)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = idx(torch.zeros(3, 2, 5, dtype=torch.uint8))
    path = tmp_path / "digits"
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"digits: 45 bytes, wanted 46 for \[3, 2, 5\]"):
        read_idx(path)
    path.write_bytes(b"GIF8")
    with pytest.raises(ValueError, match="digits: it begins with 47 49 46 38, wanted 00 00 08"):
        read_idx(path)
    path.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match="digits: damaged"):
        read_idx(path)


def test_a_folder_of_the_users_comes_first_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(origins.VARIABLE, str(tmp_path))
    pixels, labels = torch.randint(256, (4, 2, 2), dtype=torch.uint8), torch.tensor([3, 1, 4, 1], dtype=torch.uint8)
    files = {"a.gz": idx(pixels), "b.gz": idx(labels)}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(images._FILES, "test", digests)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(images, "_ORIGIN", (tmp_path / "origin").as_uri() + "/")
    with pytest.raises(FileNotFoundError, match=r"mnist/a.gz is neither in the folder that LONGSTATE_DATA names"):
        mnist("test")
    (tmp_path / "mnist").mkdir()
    for name, data in files.items():
        (tmp_path / "mnist" / name).write_bytes(gzip.compress(data))
    found = mnist("test")
    assert torch.equal(found.pixels, pixels) and found.labels.tolist() == [3, 1, 4, 1]
    (tmp_path / "mnist" / "a.gz").write_bytes(gzip.compress(files["b.gz"]))
    with pytest.raises(ValueError, match=r"a.gz: its content has SHA-256 .*: another version, or damaged"):
        mnist("test")
    with pytest.raises(ValueError, match="there is no such part"):
        mnist("validation")


def test_what_is_fetched_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(origins.VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    origin = tmp_path / "origin"
    digest = hashlib.sha256(b"numbers").hexdigest()

    def fetch() -> Path:
        return origins.located("set/file", origin.as_uri(), digest, bytes)

    with pytest.raises(FileNotFoundError, match="could not be read"):
        fetch()
    origin.write_bytes(b"others")
    with pytest.raises(ValueError, match="origin: its content has SHA-256"):
        fetch()
    assert not (tmp_path / "home/.cache/longstate/set/file").exists(), "what is not right is not kept"
    origin.write_bytes(b"numbers")
    path = fetch()
    origin.unlink()
    monkeypatch.setenv(origins.VARIABLE, str(tmp_path / "empty"))
    assert fetch() == path == tmp_path / "home/.cache/longstate/set/file" and path.read_bytes() == b"numbers"


@pytest.mark.skipif(not HERE.is_dir(), reason=f"needs MNIST in the folder that {origins.VARIABLE} names")
def test_mnist_itself() -> None:
    pixels, labels = mnist("test")
    assert pixels.shape == (10000, 28, 28) and labels[:5].tolist() == [7, 2, 1, 0, 4]
