"""Published models through the command line: in, out, and what goes along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import longstate  # noqa: E402
from longstate.cli import main  # noqa: E402


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line as the shell does, and return its exit code and what it prints."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what transformers says when it writes
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(str(left.value.code)), shown.out, shown.err

    return call


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as transformers writes it, with what stands beside models."""
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, eos_token_id=5)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").write_text('{"here": 1}')
    (tmp_path / "published" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "published"


def test_in_and_out_again(run: Callable[..., tuple[int, str, str]], published: Path, tmp_path: Path) -> None:
    code, shown, _ = run("import", published, "--out", tmp_path / "ours", "--dtype", "bfloat16")
    assert code == 0 and "parameters" in shown and "chat_template.jinja" in shown
    ours = longstate.load(tmp_path / "ours")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    code, _, _ = run("import", published, "--out", tmp_path / "ours")
    ours = longstate.load(tmp_path / "ours").eval()

    code, shown, _ = run("export", tmp_path / "ours", "--family", "mamba", "--out", tmp_path / "theirs")
    assert code == 0 and "generation_config.json" in shown
    for folder in ("ours", "theirs"):
        assert (tmp_path / folder / "tokenizer.json").read_text() == '{"here": 1}'
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == 5
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert theirs.config.eos_token_id == 5
    tokens = torch.randint(20, (1, 9))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours(tokens)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "{0}", "--out", "{0}"), "the folder that is read"),
        (("import", "{0}", "--out", "{1}", "--dtype", "int8"), "there is no such dtype"),
        (("import", "{0}/none", "--out", "{1}"), "no such folder"),
        (("export", "{0}", "--family", "mamba2", "--out", "{1}"), "mixer is 'mamba'"),
        (("export", "{0}", "--family", "llama", "--out", "{1}"), "no such family to write"),
    ],
)
def test_mistakes_are_told_in_a_line(
    run: Callable[..., tuple[int, str, str]], published: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, told = run(*(argument.format(published, tmp_path / "out") for argument in arguments))
    assert code == 2 and message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_read_when_asked_for(
    run: Callable[..., tuple[int, str, str]], published: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    code, _, told = run("import", published, "--out", tmp_path / "ours")
    assert code == 2 and "--allow-pickle" in told
    code, _, _ = run("import", published, "--out", tmp_path / "ours", "--allow-pickle")
    assert code == 0 and longstate.load(tmp_path / "ours").vocab_size == 20
