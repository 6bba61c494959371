"""Peak memory and time per token of a Mamba-2 language model, prefill and decoding, from 1k to 512k tokens.

    python benchmarks/long_context.py [--threads 2]

Each length runs in a process of its own, so that its peak of resident memory is its own. Prefill is measured in one
call, and as `longstate generate` reads a long text: in pieces, each from the state after the one before. Decoding
starts from the state after the prefill. Times are medians; memory is what a process has at most, less what it had
after warming up.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

import longstate
from longstate import LanguageModel

LENGTHS = (2**10, 2**13, 2**16, 2**19)
PIECE = 2048
MODEL = {"vocab_size": 256, "d_model": 256, "layers": [{"mixer": "mamba2", "d_state": 64}] * 4}


def peak() -> float:
    """Return the peak of resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def measure(length: int, how: str, threads: int) -> dict[str, float]:
    """Return milliseconds per token and peaks of memory for one length."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LanguageModel(**MODEL).eval()
    tokens = torch.randint(256, (1, length))
    model(tokens[:, :PIECE])  # warm up
    before = peak()
    seconds = []
    for _ in range(max(1, min(5, 2**17 // length))):
        begin = time.perf_counter()
        state = None
        piece = length if how == "whole" else PIECE
        for i in range(0, length, piece):
            state = model(tokens[:, i : i + piece], state)[1]
        seconds.append(time.perf_counter() - begin)
    after_prefill = peak()
    token, steps = tokens[:, :1], []
    for _ in range(256):
        begin = time.perf_counter()
        logits, state = model(token, state)
        token = logits[:, -1:].argmax(-1)
        steps.append(time.perf_counter() - begin)
    return {
        "prefill_us": statistics.median(seconds) / length * 1e6,
        "prefill_mib": after_prefill - before,
        "decode_us": statistics.median(steps) * 1e6,
        "decode_mib": peak() - after_prefill,
        "state_bytes": longstate.state.nbytes(state),
    }


def main() -> None:
    """Measure every length, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, metavar=("LENGTH", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(int(arguments.one[0]), arguments.one[1], arguments.threads)))
        return
    print(f"{json.dumps(MODEL)}, float32, {arguments.threads} threads, {platform.machine()}, torch {torch.__version__}")
    print("  tokens   prefill  µs/token  peak MiB  decode µs/token  decode MiB  state bytes")
    for how in ("pieces", "whole"):
        for length in LENGTHS:
            command = [sys.executable, __file__, "--threads", str(arguments.threads), "--one", str(length), how]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{length:>8} {how:>9} {row['prefill_us']:>9.1f} {row['prefill_mib']:>9.0f} "
                f"{row['decode_us']:>16.0f} {row['decode_mib']:>11.0f} {row['state_bytes']:>12.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
