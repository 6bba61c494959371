"""Tokenizers behind one small interface: bytes, and the ``tokenizer.json`` of Hugging Face ``tokenizers``."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .._files import replacing

FILE_NAME = "tokenizer.json"
# Beside it in published folders: what to add to a text, and which tokens end one.
CONFIG_NAME = "tokenizer_config.json"
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
    """What the programs ask of a tokenizer.

    Attributes:
        vocab_size: One more than the largest token.
        beginning: The tokens with which a sequence begins, before its text; often none.
    """

    vocab_size: int
    beginning: tuple[int, ...]

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
    beginning: tuple[int, ...] = ()

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

    If a ``tokenizer_config.json`` stands beside the file, as in the folders of published models, a sequence begins with
    the special tokens that the file puts before a text.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a tokenizer, or what stands beside it is damaged.
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
        # Not their number: there may be numbers that no token has.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        published = (Path(path).parent / CONFIG_NAME).is_file()
        self.beginning: tuple[int, ...] = self._before_a_text() if published else ()

    def _before_a_text(self) -> tuple[int, ...]:
        # Not by add_bos_token of the configuration: transformers 5 does not look at it where there is a tokenizer.json.
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        before = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
        return tuple(whole[: next(before, 0)])

    def number(self, token: str) -> int | None:
        """Return the number of a token, given as it stands in the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

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

    A ``tokenizer.json`` may know fewer tokens than the model: those of published models are often filled up.

    Raises:
        ValueError: If it is not the model's.
    """
    path = Path(folder, FILE_NAME)
    tokenizer: Tokenizer = TokenizerFile(path) if path.exists() else Bytes()
    if not fits_model(tokenizer, vocab_size):
        which = f"{path} has" if path.exists() else f"there is no {path}, and bytes have"
        raise ValueError(
            f"{folder}: the model has a vocabulary of {vocab_size}, but {which} {tokenizer.vocab_size}. "
            f"Put the {FILE_NAME} that the model was trained with into the folder."
        )
    return tokenizer


def fits_model(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Return whether a tokenizer may be that of a model with so large a vocabulary."""
    if isinstance(tokenizer, Bytes):
        return tokenizer.vocab_size == vocab_size
    return tokenizer.vocab_size <= vocab_size


def stop_tokens(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return the tokens that end a text of a published model, by the files beside it; often one, or none.

    The first of these says it: ``eos_token_id`` of ``generation_config.json``, that of ``config.json``, and
    ``eos_token`` of ``tokenizer_config.json``.

    Raises:
        ValueError: If one of these files is damaged, or names tokens that are no numbers.
    """
    for name in ("generation_config.json", "config.json"):
        value = read_json(Path(folder, name)).get("eos_token_id")
        if value is None:
            continue
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise ValueError(f"{Path(folder, name)}: eos_token_id is {value!r:.100}, wanted a token number or a list")
        return tuple(numbers)
    text = token_text(read_json(Path(folder, CONFIG_NAME)).get("eos_token"))
    if text is None or not Path(folder, FILE_NAME).is_file():
        return ()
    number = TokenizerFile(Path(folder, FILE_NAME)).number(text)
    return () if number is None else (number,)


def token_text(token: Any) -> str | None:
    """Return the text of a special token, which configurations write as a string or a mapping."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file beside a model says; nothing if there is no such file.

    Raises:
        ValueError: If it is not a readable mapping.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); it may be cut short") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted a mapping of names to values, but a {type(content).__name__} stands there")
    return content
