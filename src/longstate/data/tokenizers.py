"""Tokenizers behind one small interface: bytes, and the ``tokenizer.json`` of Hugging Face ``tokenizers``."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from .._files import replacing

FILE_NAME = "tokenizer.json"
# A character that is still missing bytes decodes to this.
_INCOMPLETE = "\ufffd"
# The longest character of UTF-8 has four bytes, so that no more tokens than this can wait for the rest of one.
_LONGEST_CHARACTER = 4


@runtime_checkable
class TextStream(Protocol):
    """Decodes one sequence token by token; characters come out once all their bytes are there."""

    def push(self, token: int) -> str:
        """Return the text that this token completes, often none."""
        ...

    def finish(self) -> str:
        """Return what was still incomplete, with U+FFFD for broken characters."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What the programs ask of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, with nothing added at either end."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, with U+FFFD for broken characters."""
        ...

    def stream(self) -> TextStream:
        """Return a decoder for the tokens of one sequence as they come."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Put what is needed to rebuild this tokenizer beside a model."""
        ...


class Bytes:
    """Text as its UTF-8 bytes: 256 tokens, no file."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text."""
        # A command line that is not UTF-8 reaches Python with its odd bytes as surrogates; this gives the bytes back.
        return np.frombuffer(bytearray(text.encode("utf-8", "surrogateescape")), dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of bytes."""
        return bytes(tokens).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """Return a decoder of bytes as they come."""
        return _ByteStream()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write nothing: a model folder without a ``tokenizer.json`` reads bytes."""


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class TokenizerFile:
    """A ``tokenizer.json``, read by the ``tokenizers`` package.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: no such tokenizer file. Give a tokenizer.json, or leave it out to read bytes."
            )
        from tokenizers import Tokenizer as _Tokenizer

        self._json = Path(path).read_bytes()
        try:
            self._tokenizer = _Tokenizer.from_buffer(self._json)
        except Exception as error:  # the package raises bare Exceptions (from Rust)
            raise ValueError(f"{path}: not a tokenizer.json that the tokenizers package reads ({error})") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.min_scalar_type(self.vocab_size - 1))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        """Return a decoder of tokens as they come."""
        return _FileStream(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the same ``tokenizer.json`` into a folder."""
        with replacing(Path(folder, FILE_NAME)) as part:
            part.write_bytes(self._json)


class _FileStream:
    """Decodes from the tokens of the last complete character on, because a token's text depends on those before it."""

    def __init__(self, tokenizer: TokenizerFile) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        self._waiting.append(token)
        text = self._text()
        if text.endswith(_INCOMPLETE) and len(self._waiting) < _LONGEST_CHARACTER:
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def finish(self) -> str:
        return self._text()

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that an option names: ``"bytes"``, or the path of a ``tokenizer.json``."""
    return Bytes() if name == "bytes" else TokenizerFile(name)


def tokenizer_of(folder: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Return the tokenizer beside a model: its ``tokenizer.json``, or bytes where there is none.

    Raises:
        ValueError: If its vocabulary is not the model's.
    """
    path = Path(folder, FILE_NAME)
    tokenizer: Tokenizer = TokenizerFile(path) if path.exists() else Bytes()
    if tokenizer.vocab_size != vocab_size:
        which = f"{path} has" if path.exists() else f"there is no {path}, and bytes have"
        raise ValueError(
            f"{folder}: the model has a vocabulary of {vocab_size}, but {which} {tokenizer.vocab_size}. "
            f"Put the {FILE_NAME} that the model was trained with into the folder."
        )
    return tokenizer
