"""Bytes and tokenizer.json behind one interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longstate.data.tokenizers import Bytes, Tokenizer, TokenizerFile, load_tokenizer, stop_tokens, tokenizer_of

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


def test_a_tokenizer_may_know_fewer_tokens_than_the_model(path: Path) -> None:
    count = TokenizerFile(path).vocab_size
    assert tokenizer_of(path.parent, count + 24).vocab_size == count
    with pytest.raises(ValueError, match=f"vocabulary of {count - 1}, but .*tokenizer.json has {count}"):
        tokenizer_of(path.parent, count - 1)


@pytest.fixture
def published(path: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer that has special tokens, and puts them around whole texts."""
    from tokenizers import AddedToken, processors
    from tokenizers import Tokenizer as Whole

    made = Whole.from_file(str(path))
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    ends = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "begins"),
    [
        (None, False),
        ({"bos_token": "<s>"}, True),
        ({"bos_token": "<s>", "add_bos_token": False}, True),
        ({}, True),
    ],
)
def test_how_a_text_begins(published: Path, config: dict[str, Any] | None, begins: bool) -> None:
    if config is not None:
        (published / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TokenizerFile(published / "tokenizer.json")
    assert tokenizer.beginning == ((tokenizer.number("<s>"),) if begins else ())
    assert tokenizer.decode(tokenizer.encode(TEXT).tolist()) == TEXT, "nothing is added to what is encoded"


@pytest.mark.parametrize("add", [None, True, False])
def test_a_text_begins_as_transformers_has_it(published: Path, add: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if add is None else {"add_bos_token": add}
    (published / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(published)
    ours = TokenizerFile(published / "tokenizer.json")
    whole = [*ours.beginning, *ours.encode(TEXT).tolist()]
    assert theirs(TEXT).input_ids == [*whole, ours.number("</s>")], "and what would end it is left out of a prompt"
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, ()),
        ({"config.json": {"vocab_size": 3}}, ()),
        ({"config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [8, 9]}}, (8, 9)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": None}}, (7,)),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, "</s>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, "</s>"),
        ({"tokenizer_config.json": {"eos_token": "<none>"}}, ()),
    ],
)
def test_which_tokens_end_a_text(published: Path, files: dict[str, Any], wanted: tuple[int, ...] | str) -> None:
    for name, content in files.items():
        (published / name).write_text(json.dumps(content))
    if isinstance(wanted, str):
        wanted = (TokenizerFile(published / "tokenizer.json").number(wanted),)
    assert stop_tokens(published) == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"eos_token_id": "a"}', "config.json: eos_token_id is 'a', wanted a token number"),
        ("generation_config.json", '{"eos_token_id": [true]}', "wanted a token number or a list"),
        ("generation_config.json", "[]", "generation_config.json: wanted a mapping"),
        ("tokenizer_config.json", '{"eos', "tokenizer_config.json: not readable as JSON"),
    ],
)
def test_damaged_files_beside_a_tokenizer_are_said(published: Path, name: str, content: str, message: str) -> None:
    (published / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        stop_tokens(published)


def test_what_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        load_tokenizer("byte")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
