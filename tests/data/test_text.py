"""Documents, their split, packing, and batches that depend on seed and step alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longstate.data.text import (
    IGNORED,
    Corpus,
    numbered_generator,
    pack,
    random_batch,
    read_documents,
    split,
    standard_library,
    stream_batch,
)
from longstate.data.tokenizers import Bytes


@pytest.fixture
def corpus() -> Corpus:
    return pack(["abcd", "EF", "xyz"], Bytes())


def test_a_folder_is_its_files_in_order_without_hidden_and_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"z.txt": "last", "b/c.txt": "first", "a.txt": "", ".git/x": "no", ".hidden": "no"}.items():
        (tmp_path / name).write_text(text)
    assert read_documents([tmp_path]) == ["first", "last"]
    assert read_documents([tmp_path / "z.txt", tmp_path / "b"]) == ["last", "first"]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\r\nb\n")
    assert read_documents([tmp_path / "a"]) == ["a\r\nb\n"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin: not UTF-8 text: byte 0xe9 at offset 3"):
        read_documents([tmp_path])
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"empty: the file is empty"):
        read_documents([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        read_documents([tmp_path / "nowhere"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: there is no text"):
        read_documents([tmp_path / "folder"])


def test_the_standard_library_is_there_without_its_tests() -> None:
    documents = standard_library()
    assert sum(map(len, documents)) > 5_000_000
    assert sum("def namedtuple(" in text for text in documents) == 1
    assert not any("class TestLongMessage(" in text for text in documents)
    assert documents == standard_library()


def test_the_split_holds_out_whole_documents_always_the_same() -> None:
    documents = [chr(97 + i) * 10 for i in range(20)]
    training, validation = split(documents, 0.2)
    assert len(validation) == 4
    assert sorted(training + validation) == documents
    assert training == sorted(training), "the order of the documents is kept"
    assert split(documents, 0.2) == (training, validation)
    assert validation not in (documents[:4], documents[-4:]), "they are drawn from everywhere"


def test_neither_side_of_a_split_is_empty() -> None:
    assert list(map(len, split(["a", "b"], 0.99))) == [1, 1]
    assert list(map(len, split(["a" * 1000, "b"], 0.001))) == [1, 1]
    assert split(["abcdefghij"], 0.3) == (["abcdefg"], ["hij"])
    assert split(["ab"], 0.01) == (["a"], ["b"])
    with pytest.raises(ValueError, match="single character"):
        split(["a"], 0.5)


def test_packing_marks_first_tokens_and_counts_bytes(corpus: Corpus) -> None:
    assert bytes(corpus.tokens) == b"abcdEFxyz"
    assert np.flatnonzero(corpus.first).tolist() == [0, 4, 6]
    assert pack(["é", "b"], Bytes()).n_bytes == 3
    with pytest.raises(ValueError, match="nothing follows"):
        pack(["a"], Bytes())


def test_targets_are_the_next_tokens_and_never_another_document(corpus: Corpus) -> None:
    last = dict(zip(b"abcxyzEF", b"bcd" + b"yz" + b"\0" + b"F\0", strict=True)) | {
        ord("d"): 0,
        ord("z"): 0,
        ord("F"): 0,
    }
    batch = random_batch(corpus, seed=0, step=0, batch_size=64, context=5)
    assert len(set(map(tuple, batch.tokens.tolist()))) == 4, "every window occurs"
    for token, target, start in zip(
        batch.tokens.flatten(), batch.targets.flatten(), batch.start.flatten(), strict=True
    ):
        assert target == (last[int(token)] or IGNORED)
        assert start == (chr(token) in "aEx")


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    corpus = pack(["the quick brown fox jumps over the lazy dog" * 50], Bytes())
    once = [random_batch(corpus, 3, step, 4, 16).tokens for step in range(5)]
    again = [random_batch(corpus, 3, step, 4, 16).tokens for step in reversed(range(5))][::-1]
    assert all(map(torch.equal, once, again))
    assert not any(torch.equal(a, b) for i, a in enumerate(once) for b in once[:i])
    assert not torch.equal(once[0], random_batch(corpus, 4, 0, 4, 16).tokens)


def test_numbered_generators_do_not_overlap() -> None:
    drawn = [numbered_generator(0, number).integers(2**62, size=100) for number in range(5)]
    assert len(set(np.concatenate(drawn).tolist())) == 500


def test_a_window_longer_than_the_text_is_an_error(corpus: Corpus) -> None:
    assert random_batch(corpus, 0, 0, 1, 8).tokens.tolist() == [list(b"abcdEFxy")]
    with pytest.raises(ValueError, match="context of at most 8"):
        random_batch(corpus, 0, 0, 1, 9)


def test_streams_go_on_where_they_ended_and_begin_anew_at_their_end() -> None:
    corpus = pack(["abcdefg", "xy"], Bytes())
    first, second, third = (stream_batch(corpus, step, batch_size=2, context=3) for step in range(3))
    assert [bytes(row.tolist()) for row in first.tokens] == [b"abc", b"efg"]
    assert [bytes(row.tolist()) for row in second.tokens] == [b"dab", b"xef"]
    assert [bytes(row.tolist()) for row in third.tokens] == [b"cda", b"gxe"]
    # A stream begins with a start flag, even in the middle of a document.
    assert first.start.tolist() == [[True, False, False], [True, False, False]]
    assert second.start.tolist() == [[False, True, False], [True, True, False]]
    # "d" and "x" end a stream, "g" a document: none has a target.
    assert first.targets.tolist() == [list(b"bcd"), [*b"fg", IGNORED]]
    assert second.targets.tolist() == [[IGNORED, *b"bc"], [IGNORED, *b"fg"]]
    with pytest.raises(ValueError, match="batch size of at most 4"):
        stream_batch(corpus, 0, 5, 3)
