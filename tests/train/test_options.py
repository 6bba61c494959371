"""The options: what they refuse, and how they come from a file and from a saved run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from longstate.train import Options
from longstate.train.options import read_config, resumed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be above 0"),
        ({"minutes": -1.0}, "--minutes is -1.0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"warmup": 1.0}, "--warmup is 1.0; it is a part of the whole"),
        ({"validation_fraction": 1.5}, "--validation-fraction is 1.5"),
        ({"precision": "bfloat"}, "--precision is 'bfloat'. Did you mean 'bfloat16'?"),
        ({"device": "cudo"}, "--device is 'cudo'. Did you mean 'cuda'?"),
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Options(**wrong)


def test_three_minutes_unless_something_else_is_said() -> None:
    assert Options().minutes == 3
    assert Options(steps=5).minutes is None


def test_layers_repeat_their_pattern() -> None:
    assert Options(model="s5", n_layers=2).layers == ["s5", "s5"]
    attention = {"mixer": "attention", "n_heads": 4}
    hybrid = Options(model="[mamba2, mamba2, {mixer: attention, n_heads: 4}]", n_layers=4)
    assert hybrid.layers == ["mamba2", "mamba2", attention, "mamba2"]
    for wrong in ("[1, 2]", "[]", "[mamba2"):
        with pytest.raises(ValueError, match="--model is"):
            _ = Options(model=wrong).layers


def test_every_option_is_described() -> None:
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(Options))


def test_saved_options_are_a_configuration(tmp_path: Path) -> None:
    options = Options(text=["a.txt", "ä"], steps=7, learning_rate=1e-5, model="[mamba2, s5]", carry_state=True)
    (tmp_path / "options.yaml").write_text(options.to_yaml(), encoding="utf-8")
    assert Options(**read_config(tmp_path / "options.yaml")) == options


def test_a_configuration_may_hold_layers_dashes_and_one_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("text: a.txt\nbatch-size: 3\nmodel:\n- mamba2\n- {mixer: attention, n_heads: 2}\n")
    options = Options(**read_config(path))
    assert (options.text, options.batch_size) == (["a.txt"], 3)
    assert options.layers[1] == {"mixer": "attention", "n_heads": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat: 1", "unknown option 'learning-rat'. Did you mean 'learning_rate'?"),
        ("- 1", "a list came"),
        ("batch_size: many", "batch_size is 'many'; it must be of type int"),
        ("batch_size: true", "batch_size is True; it must be of type int"),
        ("carry_state: 1", "carry_state is 1; it must be of type bool"),
        ("minutes: soon", "minutes is 'soon'; it must be of type float | None"),
        ("a: [", "not YAML"),
        ("", "a NoneType came"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_config(path)


def test_a_resumed_run_may_go_on_longer_but_not_become_another() -> None:
    saved = Options(steps=10)
    assert resumed(saved, {"steps": 20, "d_model": saved.d_model}) == dataclasses.replace(saved, steps=20)
    with pytest.raises(ValueError, match="--d-model is 64, but the run began with 128"):
        resumed(saved, {"d_model": 64})
