"""Training: it learns, and a run that died and went on is a run that never died, to the last digit."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import longstate
from longstate import Timeline
from longstate.data.text import pack, random_batch, read_documents, split, stream_batch
from longstate.data.tokenizers import Bytes
from longstate.train import Options, checkpoint, train
from longstate.train.log import read_log

LAYER = "{mixer: mamba2, d_state: 8, head_dim: 8}"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text("the cat sat on the mat. " * (10 + i))
    return Options(
        text=[str(tmp_path / "texts")],
        out=str(tmp_path / "run"),
        steps=12,
        model=LAYER,
        d_model=16,
        n_layers=2,
        context=16,
        batch_size=2,
        log_every=2,
        validate_every=5,
        device="cpu",
        checkpoint_seconds=0.0,
        sample_tokens=0,
    )


def straight(options: Options, out: Path) -> bytes:
    """Return the log of a run that is not interrupted."""
    train(dataclasses.replace(options, out=str(out)))
    return (out / "loss.csv").read_bytes()


def test_a_run_learns_and_leaves_everything_in_its_folder(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(dataclasses.replace(options, steps=60, learning_rate=1e-2, sample_tokens=10))
    log = read_log(out / "loss.csv")
    held_out = [x for x in log["validation_bits_per_byte"] if x == x]
    assert held_out[-1] < 0.6 * held_out[0]
    assert log["step"] == [*sorted({*range(2, 61, 2), *range(5, 61, 5)})]
    assert log["tokens"][-1] == 60 * 2 * 16
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "loss.csv",
        "loss.png",
        "model.safetensors",
        "options.yaml",
        "tensorboard",
        "training.safetensors",
    }
    shown = capsys.readouterr()
    assert shown.out.startswith("the cat sat"), "a sample goes to standard output, and nothing else"
    assert "documents" in shown.err
    model = longstate.load(out)
    tokens = torch.tensor([list(b"the cat sat on the")])
    assert model.loss(tokens[:, :-1], tokens[:, 1:])[0] < 3


def test_a_row_has_the_mean_loss_since_the_last_one(options: Options, tmp_path: Path) -> None:
    losses = {}
    for every in (1, 3):
        train(dataclasses.replace(options, log_every=every, validate_every=100, out=str(tmp_path / str(every))))
        losses[every] = torch.tensor(read_log(tmp_path / str(every) / "loss.csv")["train_loss"])
    assert torch.allclose(losses[3], losses[1].view(-1, 3).mean(1), rtol=1e-6)


class Killed(BaseException):
    """What ends a process; nothing catches it."""


def dying(function: Callable[..., object], at: int) -> Callable[..., object]:
    """Return the function, except that its call number ``at`` kills."""
    calls = 0

    def call(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return function(*arguments, **named)

    return call


def test_a_carried_state_reaches_the_next_step(options: Options) -> None:
    # With a learning rate of next to nothing every step meets the weights that are saved at the end.
    out = train(dataclasses.replace(options, steps=3, carry_state=True, learning_rate=1e-30, log_every=1))
    model = longstate.load(out)
    corpus = pack(split(read_documents(options.text), options.validation_fraction)[0], Bytes())
    state, carried, fresh = None, [], []
    for step in range(3):
        tokens, targets, start = stream_batch(corpus, step, options.batch_size, options.context)
        loss, state = model.loss(tokens, targets, state, Timeline(start=start))
        carried.append(loss.item())
        fresh.append(model.loss(tokens, targets, None, Timeline(start=start))[0].item())
    assert read_log(out / "loss.csv")["train_loss"] == pytest.approx(carried, abs=1e-5)
    assert all(abs(a - b) > 1e-4 for a, b in zip(carried[1:], fresh[1:], strict=True))


@pytest.mark.parametrize("carry_state", [False, True])
def test_a_run_killed_around_its_writing_goes_on_with_the_same_numbers(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carry_state: bool
) -> None:
    options = dataclasses.replace(options, carry_state=carry_state)
    expected = straight(options, tmp_path / "straight")
    resume = False
    # Each life dies at another file operation: some between a temporary file and its place, some between two files.
    for at in (4, 9, 14, 7):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(os.fsync, at))
            with pytest.raises(Killed):
                train(options, resume=resume)
        resume = True
    train(options, resume=True)
    assert (tmp_path / "run" / "loss.csv").read_bytes() == expected
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_run_killed_by_a_signal_goes_on_with_the_same_numbers(options: Options, tmp_path: Path) -> None:
    options = dataclasses.replace(options, steps=50, checkpoint_seconds=0.02)
    (tmp_path / "options.yaml").write_text(options.to_yaml())
    program = "import sys, torch; torch.set_num_threads(1); from longstate.cli import main; main(sys.argv[1:])"
    run = subprocess.Popen(
        [sys.executable, "-c", program, "train", "--config", str(tmp_path / "options.yaml")],
        env={**os.environ, "PYTHONPATH": str(Path(longstate.__file__).parents[1])},
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "run" / "loss.csv"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") > 6):
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    reached = log.read_bytes()
    train(options, resume=True)
    expected = straight(options, tmp_path / "straight")
    assert log.read_bytes() == expected
    assert reached.count(b"\n") < expected.count(b"\n"), "it was killed before its end"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(
            longstate.train.loop,
            "random_batch",
            lambda *given: (given[2] == 7 and signal.raise_signal(number), random_batch(*given))[1],
        )
        train(dataclasses.replace(options, checkpoint_seconds=1e9))
    assert "Stopped after step 8. Go on with: longstate train --out" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    train(options, resume=True)
    assert (tmp_path / "run" / "loss.csv").read_bytes() == straight(options, tmp_path / "straight")


def test_a_run_of_steps_is_a_function_of_its_seed(options: Options, tmp_path: Path) -> None:
    once, again = straight(options, tmp_path / "a"), straight(options, tmp_path / "b")
    assert once == again
    assert straight(dataclasses.replace(options, seed=1), tmp_path / "c") != once


def test_minutes_end_a_run_and_add_up(options: Options) -> None:
    short = dataclasses.replace(options, steps=None, minutes=0.5 / 60)
    began = time.monotonic()
    out = train(short)
    first = read_log(out / "loss.csv")["step"][-1]
    assert time.monotonic() - began < 60
    assert first >= 1
    train(short, resume=True)
    assert read_log(out / "loss.csv")["step"][-1] == first, "its time is over"
    train(dataclasses.replace(short, minutes=4 / 60), resume=True)  # more than a step may overshoot on a busy machine
    assert read_log(out / "loss.csv")["step"][-1] > first


def test_other_text_is_not_taken_for_the_same_run(options: Options, tmp_path: Path) -> None:
    train(options)
    (tmp_path / "texts" / "1.txt").write_text("something else entirely. " * 10)
    with pytest.raises(ValueError, match="the text is not the one that the run began with"):
        train(options, resume=True)


def test_a_damaged_checkpoint_is_refused(options: Options, tmp_path: Path) -> None:
    out = train(options)
    path = out / checkpoint.FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"training.safetensors: not a checkpoint of this model"):
        train(options, resume=True)
    path.write_bytes(whole)
    (out / "loss.csv").write_text("")
    with pytest.raises(ValueError, match=r"loss.csv: shorter than it was at the checkpoint"):
        train(options, resume=True)


def test_bfloat16_keeps_weights_in_float32(options: Options) -> None:
    out = train(dataclasses.replace(options, precision="bfloat16"))
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert read_log(out / "loss.csv")["train_loss"][-1] < 6


def test_a_loss_that_is_not_finite_ends_the_run(options: Options) -> None:
    with pytest.raises(ValueError, match="the loss became nan at step"):
        train(dataclasses.replace(options, learning_rate=1e30, warmup=0.0, clip=1e30))


def test_a_tokenizer_goes_with_the_model(options: Options, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[unk]", "the", "cat", "sat", "on", "mat", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    out = train(dataclasses.replace(options, tokenizer=str(tmp_path / "words.json")))
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    assert longstate.load(out).vocab_size == 7
    log = read_log(out / "loss.csv")
    # 24 bytes for 7 tokens.
    assert log["train_loss"][-1] / log["train_bits_per_byte"][-1] == pytest.approx(0.6931 * 24 / 7, rel=1e-3)
