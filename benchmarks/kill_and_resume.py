"""Does a training run killed at random moments end with the very losses of one that ran through?

    python benchmarks/kill_and_resume.py [--kills 8] [--steps 400] [--carry-state] [--folder FOLDER]

Trains the same run twice through the command line. One goes straight through. The other is killed with SIGKILL after a
random time of training, again and again, while it writes a checkpoint at every step; each time it goes on with
--resume. Prints where it died, compares the two loss logs and the two models byte for byte, and leaves with 0 if they
are equal.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = "import sys; from longstate.cli import main; main(sys.argv[1:])"
LAYERS = "[{mixer: mamba2, d_state: 16, head_dim: 16}, {mixer: attention, n_heads: 2, window: 32}, s5]"


def start(options: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Start a training run."""
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "train", "--out", str(out), *options], stdout=log, stderr=log
        )


def finish(run: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for a run that must end well."""
    if run.wait():
        sys.exit(f"a run failed:\n{out.with_suffix('.log').read_text()}")


def rows(out: Path) -> int:
    """Return how many rows the log has."""
    log = out / "loss.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--carry-state", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments of death")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    moments = random.Random(given.seed)
    options = ["--steps", str(given.steps), "--model", LAYERS, "--d-model", "32", "--n-layers", "3", "--device", "cpu"]
    options += ["--context", "64", "--batch-size", "4", "--log-every", "1", "--validate-every", "50"]
    options += ["--validation-tokens", "2048", "--checkpoint-seconds", "0"]
    options += ["--carry-state"] if given.carry_state else []
    straight, killed = folder / "straight", folder / "killed"

    began = time.monotonic()
    finish(start(options, straight), straight)
    print(f"straight through: {rows(straight)} rows, {time.monotonic() - began:.1f} s", flush=True)

    for life in range(1, given.kills + 1):
        resume = ["--resume"] if (killed / "options.yaml").exists() else options
        run, before = start(resume, killed), rows(killed)
        # Until it trains; then for a random time, in which it writes several checkpoints.
        while run.poll() is None and rows(killed) <= before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 2.0))
        if run.poll() is not None:
            print(f"life {life} reached the end; give more --steps or fewer --kills")
            break
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        halves = sorted(path.name for path in killed.glob("*.part")) + sorted(p.name for p in killed.glob(".*.part"))
        print(
            f"life {life}: killed after row {rows(killed)}, half-written: {', '.join(halves) or 'nothing'}", flush=True
        )
    finish(start(["--resume"], killed), killed)

    equal = {
        name: (straight / name).read_bytes() == (killed / name).read_bytes()
        for name in ("loss.csv", "model.safetensors")
    }
    print(f"last row straight: {(straight / 'loss.csv').read_text().splitlines()[-1]}")
    print(f"last row killed:   {(killed / 'loss.csv').read_text().splitlines()[-1]}")
    print(*(f"{name}: {'equal, byte for byte' if same else 'DIFFERENT'}" for name, same in equal.items()), sep="\n")
    sys.exit(not all(equal.values()))


if __name__ == "__main__":
    main()
