"""What a user may get wrong: one line on standard error that says what to do, exit code 2, nothing else."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import longstate
from longstate.cli import main
from longstate.generate import read, save_memory

MODEL = "{mixer: mamba2, d_state: 8, head_dim: 8}"
SMALL = ("--steps", "2", "--model", MODEL, "--d-model", "16", "--n-layers", "1", "--context", "8", "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, its state, and files of several kinds."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = longstate.LanguageModel(256, 16, ["s5"])
    longstate.save(model, "model")
    save_memory(read(model, [[1, 2]]), model, "notes.safetensors")
    longstate.save(longstate.LanguageModel(256, 16, ["s5"]), "other")
    longstate.save(longstate.LanguageModel(300, 16, ["s5"]), "wide")
    Path("text.txt").write_text("the cat sat on the mat. " * 20)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    Path("prompts.txt").write_text("one\n\ntwo\n")
    Path("wrong.yaml").write_text("batchsize: 3\n")
    Path("kind.yaml").write_text("batch_size: many\n")
    Path("cut").mkdir()
    shutil.copy("model/config.json", "cut")
    Path("cut/model.safetensors").write_bytes(Path("model/model.safetensors").read_bytes()[:500])
    return tmp_path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line with which the command line ends."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    shown = capsys.readouterr()
    assert left.value.code == 2
    *before, line = shown.err.splitlines()
    # A run may have said what it reads before it failed.
    assert all(text.startswith(("Text: ", "Model: ")) for text in before)
    assert line.startswith("longstate: ")
    assert "Traceback" not in shown.err
    assert shown.out.strip() == ""
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["train", "empty.txt"], "empty.txt: the file is empty"),
        (["train", "latin.txt"], "latin.txt: not UTF-8 text: byte 0xdf at offset 4"),
        (["train", "text.txt", "--out", "model"], "model exists already. Give another --out, or go on"),
        (["train", "text.txt", "--out", "text.txt"], "text.txt exists already"),
        (["train", "text.txt", "--out", "new", "--resume"], "new: there is no run to resume"),
        (["train", "text.txt", "--tokenizer", "none.json"], "none.json: no such tokenizer file"),
        (["train", "text.txt", "--model", "mamba3"], "there is no mixer 'mamba3'. Did you mean 'mamba'?"),
        (["train", "text.txt", "--model", "{mixer: mamba2, dstate: 3}"], "Did you mean 'd_state'?"),
        (["train", "text.txt", "--context", "9999", "--model", MODEL], "context of at most"),
        (["train", "text.txt", "--steps", "0"], "--steps is 0; it must be above 0"),
        (["train", "text.txt", "--steps", "many"], "'--steps'"),
        (["train", "text.txt", "--precision", "float8"], "--precision is 'float8'"),
        (["train", "--config", "none.yaml"], "none.yaml: no such configuration file"),
        (["train", "--config", "wrong.yaml"], "unknown option 'batchsize'. Did you mean 'batch_size'?"),
        (["train", "--config", "kind.yaml"], "batch_size is 'many'; it must be of type int"),
        (["train", "--batchsize", "3"], "--batchsize"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere: no such folder"),
        (["generate", "cut", "--prompt", "a"], "not a readable safetensors file"),
        (["generate", "wide", "--prompt", "a"], "the model has a vocabulary of 300"),
        (["generate", "model"], "a prompt is empty"),
        (["generate", "model", "--prompt", "a", "--prompts-file", "prompts.txt"], "both came"),
        (["generate", "model", "--prompts-file", "prompts.txt"], "prompts.txt: line 2 is empty"),
        (["generate", "model", "--prompts-file", "none.txt"], "none.txt: no such file"),
        (["generate", "model", "--document", "latin.txt"], "latin.txt: not UTF-8"),
        (["generate", "model", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "model", "--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["generate", "model", "--prompt", "a", "--dtype", "int4"], "there is no such dtype. Did you mean 'int8'?"),
        (["generate", "model", "--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["generate", "model", "--state-in", "none.safetensors"], "none.safetensors: no such file"),
        (["generate", "model", "--state-in", "text.txt"], "text.txt: not a readable safetensors file"),
        (["generate", "model", "--state-in", "model/model.safetensors"], "not a saved state"),
        (["generate", "other", "--state-in", "notes.safetensors"], "read by another model"),
        (["generate", "model", "--prompt", "a", "--state-out", "no/x"], "--state-out no/x: there is no such folder"),
        (["info", "nowhere"], "nowhere: no such folder"),
        (["info"], "folder"),
        (["analyze", "nowhere", "--out", "page"], "nowhere: no such folder"),
        (["analyze", "model", "--out", "model"], "--out model: the folder that is read"),
        (["analyze", "model", "--out", "other"], "other exists already. Give another --out"),
        (["analyze", "model"], "'--out'"),
        (["tarin"], "tarin"),
        ([], "Missing command"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(place.rglob("*"))
    assert message.lower() in failure(capsys, *arguments).lower()
    assert sorted(place.rglob("*")) == before, "a mistake leaves nothing behind"


def test_no_space_left_is_one_line_and_the_last_checkpoint_stays(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the disk be full once the run has begun."""
    calls = 0

    def fsync(number: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        line = failure(capsys, "train", "text.txt", *SMALL, "--out", "run", "--checkpoint-seconds", "0")
    assert "No space left on device" in line
    assert "Make room" in line
    assert not list(Path("run").glob("*.part"))
    with pytest.raises(SystemExit) as left:
        main(["train", "--out", "run", "--resume"])
    assert left.value.code == 0


@pytest.mark.parametrize("missing", ["lightning", "tokenizers", "matplotlib", "torchdiffeq"])
def test_a_missing_extra_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = builtins.__import__

    def fake(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.delitem(sys.modules, "longstate.analysis.curves", raising=False)
    Path("tokenizer.json").write_text("{}")
    asked = {"tokenizers": ("--tokenizer", "tokenizer.json"), "torchdiffeq": ("--model", "{mixer: ltc, solver: rk4}")}
    options = (*SMALL, *asked.get(missing, ()), "--out", "run", "--sample-tokens", "0")
    line = failure(capsys, "train", "text.txt", *options)
    extra = "ode" if missing == "torchdiffeq" else "train"
    assert line.endswith(f"No module named {missing!r}. It comes with: pip install 'longstate[{extra}]'")


def test_our_own_mistakes_keep_their_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("longstate.cli.info.token_cost", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", "model"])


def test_a_users_mistake_shows_its_traceback_on_request(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "info", "nowhere"])


def test_generation_and_information_need_no_extra(place: Path) -> None:
    import subprocess

    code = (
        "import sys\nfrom longstate.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as left: assert not left.code\n"
        "print(sorted({'lightning', 'matplotlib', 'tokenizers', 'tensorboard'} & set(sys.modules)))"
    )
    source = str(Path(longstate.__file__).parents[1])
    for arguments in (["doctor"], ["info", "model"], ["generate", "model", "--prompt", "a", "--max-tokens", "2"]):
        found = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode, found.stdout.splitlines()[-1], found.stderr) == (0, "[]", "")
