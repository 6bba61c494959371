"""Bytes and tokenizer.json behind one interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longstate.data.tokenizers import Bytes, Tokenizer, TokenizerFile, load_tokenizer, tokenizer_of

TEXT = "Grüße an 世界 🎉 – the end\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE, whose tokens may be parts of characters, as those of most language models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the end of the end " * 10], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(params=["bytes", "file"])
def tokenizer(request: pytest.FixtureRequest, path: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(path))


def test_a_text_survives(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens.tolist()) == TEXT
    assert tokens.max() < tokenizer.vocab_size


def test_text_comes_as_soon_as_a_character_is_complete(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(TEXT).tolist()]
    assert "".join(pieces) + stream.finish() == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert "世" in pieces
    assert stream.finish() == ""


def test_broken_characters_are_shown_and_do_not_hold_up_the_rest(tokenizer: Tokenizer) -> None:
    part = tokenizer.encode("世").tolist()[0]
    stream = tokenizer.stream()
    shown = "".join(stream.push(token) for token in [part] * 50)
    assert len(shown) >= 40
    rest = "".join(stream.push(token) for token in tokenizer.encode(" end").tolist()) + stream.finish()
    assert rest.endswith(" end")


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("世").tolist()[:-1]] == ["", ""]
    assert "\ufffd" in stream.finish()


def test_a_token_whose_text_depends_on_the_one_before(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    # The space before a word belongs to its token and is dropped where a text begins.
    made = Tokenizer(models.WordLevel({"▁the": 0, "▁end": 1}, unk_token="▁the"))
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    stream = TokenizerFile(tmp_path / "tokenizer.json").stream()
    assert [stream.push(token) for token in (0, 1, 1)] == ["the", " end", " end"]


def test_bytes_that_are_not_text_survive_a_command_line() -> None:
    assert Bytes().encode(b"a\xff".decode("utf-8", "surrogateescape")).tolist() == [97, 255]


def test_a_tokenizer_is_kept_beside_the_model(path: Path, tmp_path: Path) -> None:
    tokenizer = TokenizerFile(path)
    tokenizer.save(tmp_path)
    assert np.array_equal(tokenizer_of(tmp_path, tokenizer.vocab_size).encode(TEXT), tokenizer.encode(TEXT))
    with pytest.raises(ValueError, match=r"vocabulary of 256, but .*tokenizer.json has 2"):
        tokenizer_of(tmp_path, 256)


def test_without_a_file_the_model_must_read_bytes(tmp_path: Path) -> None:
    assert isinstance(tokenizer_of(tmp_path, 256), Bytes)
    with pytest.raises(ValueError, match=r"vocabulary of 280, but there is no .*tokenizer.json"):
        tokenizer_of(tmp_path, 280)


def test_what_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        load_tokenizer("byte")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
