"""What a run says while it goes on: a CSV file for programs, and a line or a bar for people."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

FILE_NAME = "loss.csv"
# Losses are in nats per token. Nothing here depends on the clock, so that equal runs write equal files.
COLUMNS = (
    "step",
    "tokens",
    "learning_rate",
    "train_loss",
    "train_bits_per_byte",
    "validation_loss",
    "validation_bits_per_byte",
)
# Seconds between two lines where there is no terminal to draw a bar on.
_QUIET = 15.0


class LossLog:
    """A CSV file of losses that can be cut back to an earlier size.

    Args:
        path: The file.
        size: Bytes to keep; 0 begins anew.

    Raises:
        ValueError: If the file is shorter than that.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        if size and (not path.is_file() or path.stat().st_size < size):
            raise ValueError(
                f"{path}: shorter than it was at the checkpoint, so that it cannot be continued. Put it back."
            )
        self._file = open(path, "a" if size else "w", newline="", encoding="utf-8")
        if size:
            self._file.truncate(size)
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if not size:
            self._writer.writeheader()

    def write(self, row: dict[str, int | float]) -> None:
        """Append a row; columns left out stay empty."""
        # Nine digits tell any two float32 numbers apart.
        self._writer.writerow({name: f"{x:.9g}" if isinstance(x, float) else x for name, x in row.items()})
        self._file.flush()

    def sync(self) -> int:
        """Make sure that all rows are on the disk, and return the size of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> dict[str, list[float]]:
    """Return the columns of a log, with NaN where a row has no value."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in COLUMNS}


class Display:
    """A progress bar on a terminal; elsewhere a plain line now and then. Both go to standard error."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)
        self._progress = Progress(
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>3.0f}% {task.description}", markup=False),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=1.0)
        self._said = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, soft_wrap=True)

    def update(self, part: float, text: str, important: bool) -> None:
        """Show how far the run is; where there is no bar, only if it is important or the last line is old."""
        if self.console.is_terminal:
            self._progress.update(self._task, completed=part, description=text)
        elif important or time.monotonic() - self._said > _QUIET:
            self.say(f"{part:4.0%} {text}")
            self._said = time.monotonic()
