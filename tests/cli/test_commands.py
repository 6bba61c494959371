"""The commands, from their arguments to what they print."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import longstate
from longstate.cli import main
from longstate.cli.train import command
from longstate.compression import quantize
from longstate.generate import Sampling, generate
from longstate.train import Options

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line as the shell does, and return what it prints."""

    def call(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert left.value.code == code, shown.err
        return shown.out

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, sharper than a new one."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = longstate.LanguageModel(256, 16, [{"mixer": "mamba2", "d_state": 8, "head_dim": 8}, "s5"])
        model.lm_head.weight.data *= 40
    longstate.save(model, folder)
    return folder


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Options, bool]]:
    """What the command would train with."""
    calls: list[tuple[Options, bool]] = []
    monkeypatch.setattr("longstate.cli.train.run", lambda options, resume=False: calls.append((options, resume)))
    return calls


def test_train_has_the_options_of_its_class_and_their_defaults(run: Run, used: list[tuple[Options, bool]]) -> None:
    run("train")
    assert used == [(Options(), False)]
    names = {field.name for field in dataclasses.fields(Options)}
    assert set(command.__signature__.parameters) - names == {"typer_context", "config", "resume"}
    shown = run("train", "--help")
    assert all("--" + name.replace("_", "-") in shown for name in names - {"text"})


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(
    run: Run, used: list[tuple[Options, bool]], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("minutes: 7\nbatch-size: 5\ntext: [a, b]\ncarry_state: true\nlearning_rate: 1e-3\n")
    run("train", "--config", config)
    run("train", "c", "--batch-size", 6, "--config", config, "--no-carry-state")
    wanted = Options(minutes=7.0, batch_size=5, text=["a", "b"], carry_state=True, learning_rate=1e-3)
    assert used[0] == (wanted, False)
    assert used[1] == (dataclasses.replace(wanted, batch_size=6, text=["c"], carry_state=False), False)


def test_resume_takes_the_options_that_the_run_began_with(
    run: Run, used: list[tuple[Options, bool]], tmp_path: Path
) -> None:
    saved = Options(out=str(tmp_path), steps=10, d_model=64, text=["a"])
    (tmp_path / "options.yaml").write_text(saved.to_yaml())
    run("train", "--out", tmp_path, "--resume")
    run("train", "--out", tmp_path, "--resume", "--steps", 20, "--d-model", 64)
    assert used == [(saved, True), (dataclasses.replace(saved, steps=20), True)]


def test_generate_streams_what_the_library_generates(run: Run, folder: Path) -> None:
    model = longstate.load(folder).eval()
    sampling = Sampling(temperature=0.7, top_k=40, seed=3)
    wanted = "".join(step.text[0] for step in generate(model, ["def "], sampling=sampling, max_tokens=25))
    given = ("generate", folder, "--prompt", "def ", "--max-tokens", 25, "--seed", 3)
    assert run(*given, "--temperature", 0.7, "--top-k", 40) == f"def {wanted}\n"
    stop = wanted[10:12]
    shown = run(*given, "--temperature", 0.7, "--top-k", 40, "--stop", stop, "--stop", "never there")
    assert shown == f"def {wanted.split(stop)[0]}\n"


def test_a_file_of_prompts_is_answered_as_a_batch(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def f(\na\n")
    common = ("--max-tokens", 8, "--temperature", 0)
    alone = [run("generate", folder, "--prompt", prompt, *common) for prompt in ("def f(", "a")]
    shown = run("generate", folder, "--prompts-file", tmp_path / "prompts.txt", *common)
    assert shown == f"[1] {alone[0]}\n[2] {alone[1]}"


def test_a_document_is_read_once_and_asked_about_later(run: Run, folder: Path, tmp_path: Path) -> None:
    text = "It was the best of times, it was the worst of times. " * 5
    (tmp_path / "book.txt").write_text(text)
    notes = tmp_path / "notes.safetensors"
    assert run("generate", folder, "--document", tmp_path / "book.txt", "--state-out", notes, "--max-tokens", 0) == "\n"
    size = notes.stat().st_size
    later = run("generate", folder, "--state-in", notes, "--prompt", "What was it?", "--max-tokens", 20)
    at_once = run("generate", folder, "--prompt", text + "What was it?", "--max-tokens", 20)
    assert text + later == at_once
    (tmp_path / "book.txt").write_text(text * 3)
    run("generate", folder, "--document", tmp_path / "book.txt", "--state-out", notes, "--max-tokens", 0)
    assert notes.stat().st_size == size, "a recurrent state does not grow with the text"
    (tmp_path / "prompts.txt").write_text("Who?\nWhere?")
    both = run("generate", folder, "--state-in", notes, "--prompts-file", tmp_path / "prompts.txt", "--max-tokens", 3)
    assert both.startswith("[1] Who?")


def test_generation_goes_on_from_its_own_state(run: Run, folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.safetensors"
    # Tokens above 127 would be cut in the middle of a character, which a file of tokens does not see.
    first = run("generate", folder, "--prompt", "a", "--max-tokens", 10, "--state-out", notes, "--seed", 4)
    rest = run("generate", folder, "--state-in", notes, "--max-tokens", 10, "--seed", 4)
    whole = run("generate", folder, "--prompt", "a", "--max-tokens", 20, "--seed", 4)
    assert first.removesuffix("\n") + rest == whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_of_a_type(run: Run, folder: Path, dtype: str) -> None:
    model = longstate.load(folder).eval()
    model = quantize(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    wanted = "".join(step.text[0] for step in generate(model, ["def "], sampling=Sampling(temperature=0), max_tokens=9))
    given = ("generate", folder, "--prompt", "def ", "--max-tokens", 9, "--temperature", 0)
    assert run(*given, "--dtype", dtype) == f"def {wanted}\n"
    assert dtype != "float32" or run(*given) == f"def {wanted}\n"


def test_info_says_what_a_model_is_made_of(run: Run, folder: Path) -> None:
    lines = run("info", folder).splitlines()
    assert lines[0].split() == ["layer", "parameters", "state", "bytes", "FLOPs/token", "bytes/token"]
    assert [line.split()[:2] for line in lines[3:5]] == [["0", "Mamba2"], ["1", "S5"]]
    model = longstate.load(folder)
    total = next(line for line in lines if line.startswith("all")).replace(",", "").split()
    assert int(total[1]) == sum(p.numel() for p in model.parameters())
    assert int(total[2]) == longstate.state.nbytes(model.initial_state(1))


def test_doctor_says_what_is_in_use(run: Run) -> None:
    shown = run("doctor")
    assert torch.__version__ in shown
    assert longstate.__version__ in shown
    for op, backends in longstate.ops.backends().items():
        assert all(
            any(op in x and name in x and status in x for x in shown.splitlines()) for name, status in backends.items()
        )


def test_the_version_is_said(run: Run) -> None:
    assert run("--version") == f"{longstate.__version__}\n"


def test_a_run_can_be_repeated_from_its_own_options(run: Run, used: list[tuple[Options, bool]], tmp_path: Path) -> None:
    options = Options(steps=3, model="[mamba2, {mixer: attention, n_heads: 4}]", learning_rate=1e-5)
    (tmp_path / "options.yaml").write_text(options.to_yaml())
    run("train", "--config", tmp_path / "options.yaml")
    assert used == [(options, False)]
    assert yaml.safe_load((tmp_path / "options.yaml").read_text())["steps"] == 3
