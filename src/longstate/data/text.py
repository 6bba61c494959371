"""Text as batches of tokens: documents, a split, packing, and batches that are pure functions of the step."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .._shapes import Bool, Int, Tensor
from .tokenizers import Tokenizer

# What a target says where nothing is to be predicted: the default of torch's cross_entropy.
IGNORED = -100
# Folders of the standard library's place that are not its sources: tests, and what others installed.
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def numbered_generator(seed: int, number: int) -> np.random.Generator:
    """Return the random numbers that belong to one step (or draw) of one seed, whichever came before it."""
    # The number goes above the lower half of the counter, which counts what is drawn: streams never overlap.
    return np.random.Generator(np.random.Philox(key=seed, counter=number << 128))


def read_documents(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Read text files; a folder stands for all its files, sorted by path, without hidden and empty ones.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file is empty or not UTF-8, or a folder holds no text.
    """
    documents = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [text for file in _files(path) if (text := _read(file))]
            if not found:
                raise ValueError(f"{path}: there is no text in this folder. Give a folder with text files, or a file.")
            documents += found
        elif path.is_file():
            if not (text := _read(path)):
                raise ValueError(f"{path}: the file is empty. Give a file with text in it.")
            documents.append(text)
        else:
            raise FileNotFoundError(
                f"{path}: no such file or folder. Give the path of a text file or a folder of them."
            )
    return documents


def standard_library() -> list[str]:
    """Return the sources of the running Python's standard library, one document a file, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in _files(root, "*.py") if not _NOT_SOURCES & set(file.relative_to(root).parts))
    return [text for file in files if (text := _read(file))]


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    files = (file for file in folder.rglob(pattern) if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _read(path: Path) -> str:
    # Bytes, not text mode: line ends stay what they are, so that the text has the same bytes on every system.
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}. "
            f"Convert it (iconv -f LATIN1 -t UTF-8) or leave it out."
        ) from error


def split(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split into training and validation documents, always the same way for the same documents.

    Documents are held out whole, drawn at random until they make up the fraction of all characters. A document that
    stands alone is cut instead, and its end is held out.

    Raises:
        ValueError: If there is too little text for two parts.
    """
    if len(documents) == 1:
        (text,) = documents
        cut = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
        if not cut:
            raise ValueError("the text is a single character, which cannot be split. Give more text.")
        return [text[:cut]], [text[cut:]]
    wanted = fraction * sum(map(len, documents))
    held, size = set(), 0
    for i in numbered_generator(0, 0).permutation(len(documents))[:-1].tolist():
        if size >= wanted:
            break
        held.add(i)
        size += len(documents[i])
    parts: tuple[list[str], list[str]] = ([], [])
    for i, text in enumerate(documents):
        parts[i in held].append(text)
    return parts


class Corpus(NamedTuple):
    """Documents packed one after another.

    Attributes:
        tokens: All tokens.
        first: True at each document's first token.
        n_bytes: Size of the text in UTF-8.
    """

    tokens: np.ndarray
    first: np.ndarray
    n_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes that a token stands for."""
        return self.n_bytes / len(self.tokens)


def pack(documents: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """Encode documents and lay them end to end.

    Raises:
        ValueError: If there are fewer than two tokens, so that there is nothing to predict.
    """
    pieces = [tokenizer.encode(text) for text in documents]
    tokens = np.concatenate([piece.astype(np.min_scalar_type(tokenizer.vocab_size - 1)) for piece in pieces])
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: nothing follows from anything. Give more text.")
    first = np.zeros(len(tokens), dtype=bool)
    # A document of no tokens shares its position with the next one.
    begins = np.cumsum([0, *map(len, pieces)])[:-1]
    first[begins[begins < len(tokens)]] = True
    return Corpus(tokens, first, sum(len(text.encode("utf-8")) for text in documents))


class Batch(NamedTuple):
    """Tokens and what follows each of them.

    Attributes:
        tokens: The input.
        targets: The next token of the same document, or ``IGNORED`` where there is none.
        start: True at each document's first token.
    """

    tokens: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    start: Bool[Tensor, "b t"]


def _batch(corpus: Corpus, index: np.ndarray, first: np.ndarray) -> Batch:
    """Return tokens at ``index [b t+1]``, the last of each row as a target only."""
    tokens = torch.from_numpy(corpus.tokens[index].astype(np.int64))
    start = torch.from_numpy(first)
    # A document's last token must not be asked for the first of the next.
    return Batch(tokens[:, :-1], tokens[:, 1:].masked_fill(start[:, 1:], IGNORED), start[:, :-1])


def random_batch(corpus: Corpus, seed: int, step: int, batch_size: int, context: int) -> Batch:
    """Return windows at random places: a pure function of seed and step.

    Raises:
        ValueError: If the text is shorter than a window.
    """
    room = len(corpus.tokens) - context
    if room < 1:
        raise ValueError(
            f"the training text has {len(corpus.tokens)} tokens, fewer than a window of {context} and its target. "
            f"Give more text, or a context of at most {len(corpus.tokens) - 1}."
        )
    offset = numbered_generator(seed, step).integers(room, size=(batch_size, 1))
    index = offset + np.arange(context + 1)
    return _batch(corpus, index, corpus.first[index])


def stream_batch(corpus: Corpus, step: int, batch_size: int, context: int) -> Batch:
    """Return the next window of each of ``batch_size`` streams, for a state carried from step to step.

    The text is cut into streams of equal length. Row i of step s + 1 goes on where row i of step s ended; a stream that
    has been read to its end begins anew, with a start flag. A pure function of the step.

    Raises:
        ValueError: If there is too little text for so many streams.
    """
    length = len(corpus.tokens) // batch_size
    if length < 2:
        raise ValueError(
            f"the training text has {len(corpus.tokens)} tokens, too few for {batch_size} streams. "
            f"Give more text, or a batch size of at most {len(corpus.tokens) // 2}."
        )
    place = (step * context + np.arange(context + 1)) % length
    index = np.arange(batch_size)[:, None] * length + place
    return _batch(corpus, index, corpus.first[index] | (place == 0))
