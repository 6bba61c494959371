"""Time and memory per token of a Mamba-2 language model, prefill and decoding, after 1k to 512k tokens.

    python benchmarks/long_context.py [--threads 2] [--rounds 30]

Time: one text is read in pieces of 1024 tokens, as `longstate generate` reads; the states after 0, 7k, 63k and 511k
of them are kept as values. Then, round by round, each of these states reads the next piece and decodes 32 tokens, so
that whatever else the machine does meets all lengths alike; medians of the rounds are printed. Memory: the peak of
resident memory over what a process has after reading one piece, each length in a process of its own, read in pieces
and in one call; decoding after that must add nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import longstate
from longstate import LanguageModel

LENGTHS = (2**10, 2**13, 2**16, 2**19)
PIECE = 1024
MODEL = {"vocab_size": 256, "d_model": 256, "layers": [{"mixer": "mamba2", "d_state": 64}] * 4}


def build() -> tuple[LanguageModel, torch.Tensor]:
    """Return the model, and a text as long as the longest."""
    torch.manual_seed(0)
    return LanguageModel(**MODEL).eval(), torch.randint(256, (1, LENGTHS[-1]))


def decode(model: LanguageModel, token: torch.Tensor, state: object, steps: int) -> object:
    """Take the most likely token so many times; return the state."""
    for _ in range(steps):
        logits, state = model(token, state)
        token = logits[:, -1:].argmax(-1)
    return state


@torch.inference_mode()
def times(rounds: int) -> None:
    """Print the time per token at each length."""
    model, tokens = build()
    before, state = {}, None
    begin = time.perf_counter()
    for i in range(0, LENGTHS[-1], PIECE):
        if i + PIECE in LENGTHS:
            before[i + PIECE] = state
        state = model(tokens[:, i : i + PIECE], state)[1]
    whole = (time.perf_counter() - begin) / LENGTHS[-1]
    print(
        f"all of {LENGTHS[-1]} tokens: {whole * 1e6:.1f} µs per token, {longstate.state.nbytes(state)} bytes of state"
    )
    prefill: dict[int, list[float]] = {length: [] for length in LENGTHS}
    decoding: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(rounds):
        for length in LENGTHS:
            begin = time.perf_counter()
            state = model(tokens[:, length - PIECE : length], before[length])[1]
            middle = time.perf_counter()
            decode(model, tokens[:, :1], state, 32)
            prefill[length].append((middle - begin) / PIECE * 1e6)
            decoding[length].append((time.perf_counter() - middle) / 32 * 1e6)
    print("tokens before   prefill µs/token   decoding µs/token")
    first = [statistics.median(x[LENGTHS[0]]) for x in (prefill, decoding)]
    for length in LENGTHS:
        medians = [statistics.median(x[length]) for x in (prefill, decoding)]
        ratios = [f"{median:9.1f} ({median / base - 1:+.1%})" for median, base in zip(medians, first, strict=True)]
        print(f"{length:>13}   {ratios[0]:>16}   {ratios[1]:>17}")


def peak() -> float:
    """Return the peak of resident memory of this process so far, in MiB."""
    # Not getrusage: a process begins with its parent's peak there.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@torch.inference_mode()
def memory(length: int, piece: int) -> tuple[float, float]:
    """Return what reading adds to the peak, and what decoding adds after it, in MiB."""
    model, tokens = build()
    model(tokens[:, :PIECE])
    before, state = peak(), None
    for i in range(0, length, piece):
        state = model(tokens[:, i : min(i + piece, length)], state)[1]
    after = peak()
    decode(model, tokens[:, :1], state, 200)
    return after - before, peak() - after


def main() -> None:
    """Measure times, then memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--memory", nargs=2, type=int, metavar=("LENGTH", "PIECE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(json.dumps(memory(*arguments.memory)))
        return
    print(f"{json.dumps(MODEL)}, float32, {arguments.threads} threads, {platform.machine()}, torch {torch.__version__}")
    times(arguments.rounds)
    print("       tokens   in pieces: MiB   decoding adds   in one call: MiB   KiB per token")
    for length in LENGTHS:
        rows = []
        for piece in (PIECE, length):
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--memory",
                str(length),
                str(piece),
            ]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        (read, decoded), (called, _) = rows
        print(f"{length:>13}   {read:>14.1f}   {decoded:>13.1f}   {called:>16.1f}   {called * 1024 / length:>13.1f}")


if __name__ == "__main__":
    main()
