"""The plot of losses is a picture, whatever was logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstate.analysis.curves import save_loss_plot

NAN = float("nan")


@pytest.mark.parametrize(
    ("training", "validation"),
    [([8.0, 4.0, 3.0, 2.5], [NAN, 4.1, NAN, 2.6]), ([8.0], [NAN]), ([3.0], [3.0])],
)
def test_a_picture_is_written(tmp_path: Path, training: list[float], validation: list[float]) -> None:
    tokens = [1000.0 * (i + 1) for i in range(len(training))]
    columns = {"tokens": tokens, "train_bits_per_byte": training, "validation_bits_per_byte": validation}
    save_loss_plot(columns, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
