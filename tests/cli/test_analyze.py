"""``longstate analyze``: the page, its pictures and its table."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import longstate
from longstate.analysis import linear
from longstate.cli import main
from longstate.cli.analyze import _initial
from longstate.train import Options, train

LAYERS = "[{mixer: s4d, d_state: 4}, {mixer: mamba2, d_state: 8, head_dim: 8}, {mixer: lru, d_state: 3}]"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return left.value.code, shown.out, shown.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    text = folder.parent / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    train(
        Options(
            text=[str(text)],
            out=str(folder),
            steps=2,
            model=LAYERS,
            d_model=16,
            n_layers=3,
            context=8,
            log_every=1,
            seed=5,
            device="cpu",
            sample_tokens=0,
        )
    )
    return folder


def test_a_run_becomes_a_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, errors = call(capsys, "analyze", run, "--out", tmp_path / "report")
    assert (code, errors) == (0, "")
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="([^"]+)"', page)
    assert {"loss.png", "memory.png", "layer0-poles.png", "layer0-bode.png", "layer2-hankel.png"} < set(pictures)
    assert not any(name.startswith("layer1") for name in pictures)
    assert {*pictures, "index.html"} == {path.name for path in (tmp_path / "report").iterdir()}
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))
    assert "before training and after" in page
    assert "1 Mamba2 is left out: Mamba2 is not a linear time-invariant system" in shown
    layer = longstate.load(run).backbone.layers[2].mixer
    decay = torch.exp(-layer.nu_log.exp()).max().item()
    (hankel,) = linear.hankel_singular_values(layer)
    row = ["2 LRU", "6", f"{-1 / np.log(decay):.4g}", f"{1 - decay:.3g}", f"{hankel[0]:.3g}"]
    assert re.split(r"\s{2,}", next(line.strip() for line in shown.splitlines() if "LRU" in line)) == row
    assert all(f"<td>{cell}</td>" in page for cell in row[1:])


def test_the_model_before_training_is_drawn_again(run: Path, tmp_path: Path) -> None:
    """Weights before training are those of a run that took no step: its checkpoint at the beginning."""
    trained = longstate.load(run)
    initial = _initial(run, trained)
    assert initial is not None
    torch.manual_seed(5)
    fresh = longstate.LanguageModel(256, 16, Options(model=LAYERS, n_layers=3).layers)
    for name, tensor in initial.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])
        # Two steps of a warm-up move every parameter by at most as much as two learning rates.
        assert (tensor - trained.state_dict()[name]).abs().max() <= 2 * 2e-3 + 1e-6
    longstate.save(trained, tmp_path / "alone")
    assert _initial(tmp_path / "alone", trained) is None


def test_a_model_without_a_run_has_no_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longstate.save(longstate.LanguageModel(256, 8, [{"mixer": None, "mlp": {"hidden": 8}}, "rglru"]), tmp_path / "m")
    code, shown, _ = call(capsys, "analyze", tmp_path / "m", "--out", tmp_path / "report")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "memory.png"]
    assert "1 RGLRU is left out" in shown
    code, _, errors = call(capsys, "analyze", tmp_path / "m", "--out", tmp_path / "report")
    assert code == 2 and "report exists already. Give another --out" in errors
    assert not any(name in errors for name in ("Traceback", "\n\n"))


def test_an_unstable_layer_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = longstate.LanguageModel(256, 8, [{"mixer": "s4d", "d_state": 2, "parameterization": "direct"}])
    model.backbone.layers[0].mixer.A_real.data.fill_(0.2)
    longstate.save(model, tmp_path / "m")
    code, shown, _ = call(capsys, "analyze", tmp_path / "m", "--out", tmp_path / "report")
    assert code == 0
    row = re.split(r"\s{2,}", next(line.strip() for line in shown.splitlines() if "S4D" in line))
    assert row[2] == "inf" and row[3].startswith("-") and len(row) == 4
    assert not (tmp_path / "report/layer0-hankel.png").exists()
