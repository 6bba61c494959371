"""Digits as sequences, on one core: pixels one at a time (sMNIST), and spoken ones as raw waves at 8 kHz (FSDD).

    LONGSTATE_DATA=… python benchmarks/classify.py smnist --mixer s5 --minutes 12 [--seed 0] [--out results.jsonl]
    LONGSTATE_DATA=… python benchmarks/classify.py fsdd --mixer lru --minutes 12

Without LONGSTATE_DATA the data are fetched. The minutes are of processor time of one thread, evaluation left out: on a
machine that others use too, the clock says little. The learning rate rises over 5 % of them and falls by half a cosine;
nothing is chosen by the test set, which is read once, at the end: 10,000 pictures, and recordings 0 to 4 of each
speaker and digit, 300 in all, the official split.

In both, one layer reads at the full rate, and averages over windows of steps are what the later layers read. Sounds
lose 0.95 of the sample before each and are scaled to a mean square of 1; in training their speed, loudness and
beginning vary, and noise is added. A model trained at 8 kHz is then read at 4 kHz without more training: each sound is
low-passed and every second sample taken, and the timeline says dt = 2. LRU has no continuous time; there λ² and
(1 + λ)B, which is what two steps of a held input make, take the place of λ and B.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import signal
from torch import Tensor, nn
from torch.nn import functional

import longstate
from longstate import LRU, Classifier, Timeline
from longstate.data.audio import padded, spoken_digits
from longstate.data.images import as_sequences, mnist
from longstate.data.text import numbered_generator
from longstate.train.optimizer import adamw, rate_factor, set_rates

# The layers of each mixer, the first of them apart: it reads the full rate.
MIXERS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "smnist": {
        "s4d": [{"d_state": 16}, {"d_state": 16}],
        "s5": [{"d_state": 64}, {"d_state": 64}],
        "lru": [{"d_state": 48, "max_phase": math.pi / 5}, {"d_state": 48, "max_phase": math.pi / 5}],
        "s4": [{"d_state": 16}, {"d_state": 16}],
    },
    "fsdd": {
        "s4d": [{"d_state": 16, "initialization": "lin", "dt_min": 0.01, "dt_max": 0.3}, {"d_state": 16}],
        "s5": [{"d_state": 64, "n_blocks": 8, "dt_min": 0.05, "dt_max": 0.3}, {"d_state": 64}],
        "lru": [{"d_state": 32, "r_min": 0.95, "r_max": 0.999, "max_phase": math.pi}, {"d_state": 64}],
        "s4": [{"d_state": 16, "measure": "fout", "dt_min": 0.005, "dt_max": 0.15}, {"d_state": 16}],
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "smnist": {"d_model": 32, "pool": [4, 1, 1], "expand": 2},
    "fsdd": {"d_model": 32, "pool": [8, 4, 1, 1]},
}
BATCH = {"smnist": 50, "fsdd": 16}
LONGEST = 8000  # samples of a sound in training
EMPHASIS = 0.95  # of the sample before, taken from each; at another rate its power of dt


class Batch(NamedTuple):
    """Sequences, which of their steps count, and their classes."""

    x: Tensor
    timeline: Timeline | None
    labels: Tensor


def build(task: str, mixer: str) -> Classifier:
    first, later = ({"mixer": mixer, **options} for options in MIXERS[task][mixer])
    if task == "fsdd":
        later["mlp"] = {"hidden": 128}
    size = SIZES[task]
    return Classifier(1, 10, layers=[first] + [later] * (len(size["pool"]) - 1), **size)


def pictures(seed: int) -> Iterator[Batch]:
    """Yield training batches for ever, each picture once an epoch."""
    pixels, labels = mnist("train")
    for epoch in range(10**9):
        order = torch.from_numpy(numbered_generator(seed, epoch).permutation(len(labels)))
        for index in order.split(BATCH["smnist"]):
            yield Batch(as_sequences(pixels[index]), None, labels[index])


def sounds(seed: int) -> Iterator[Batch]:
    """Yield training batches for ever, each recording once an epoch, beside others of about its length."""
    waves, labels, _ = spoken_digits("train")
    lengths = np.array([len(x) for x in waves])
    for epoch in range(10**9):
        random = numbered_generator(seed, epoch)
        order = np.argsort(lengths * random.uniform(0.9, 1.1, len(lengths)))
        batches = np.array_split(order, len(order) // BATCH["fsdd"])
        for i in random.permutation(len(batches)):
            yield batch_of([altered(waves[j].numpy(), random) for j in batches[i]], labels[batches[i]])


def whitened(x: np.ndarray, dt: float = 1.0) -> np.ndarray:
    """Raise the high part of a sound, as is usual for speech, and give it a mean square of 1.

    Quieter ones would pass the first layer as straight lines, beside the encoder's bias.
    """
    x = np.append(x[:1], x[1:] - EMPHASIS**dt * x[:-1])
    return x / max(np.sqrt((x**2).mean()), 1e-4)


def altered(x: np.ndarray, random: np.random.Generator) -> Tensor:
    """Vary speed, beginning and loudness, and add noise."""
    speed = random.uniform(0.9, 1.12)
    x = np.interp(np.arange(0, len(x) - 1, speed), np.arange(len(x)), x)
    x = x[max(0, int(random.integers(-600, 400))) :][:LONGEST]
    x = whitened(np.concatenate([np.zeros(random.integers(400)), x])) * random.uniform(0.7, 1.2)
    return torch.from_numpy(x + 10 ** random.uniform(-3, -1) * random.standard_normal(len(x))).float()


def batch_of(waves: Sequence[Tensor], labels: Tensor, dt: float = 1.0) -> Batch:
    rows, valid = padded(waves)
    return Batch(rows[..., None], Timeline(dt=None if dt == 1 else torch.tensor([dt]), valid=valid), labels)


def held_sounds(every: int = 1, dt: float = 1.0) -> Iterator[Batch]:
    """Yield the test set in order of length, at the full rate or one sample in ``every``."""
    waves, labels, _ = spoken_digits("test")
    for index in torch.tensor([len(x) for x in waves]).argsort().split(BATCH["fsdd"]):
        rows = [waves[i].numpy() for i in index]
        taken = [whitened(signal.resample_poly(x, 1, every) if every > 1 else x, every) for x in rows]
        yield batch_of([torch.from_numpy(x).float() for x in taken], labels[index], dt)


def held_pictures() -> Iterator[Batch]:
    pixels, labels = mnist("test")
    for index in torch.arange(len(labels)).split(100):
        yield Batch(as_sequences(pixels[index]), None, labels[index])


def at_half_rate(model: Classifier) -> Classifier:
    """Return a copy whose first layer, an LRU, takes two of its steps at once."""
    model = copy.deepcopy(model)
    mixer, model.factors[0] = model.stacks[0].layers[0].mixer, model.factors[0] // 2
    decay = torch.exp(torch.complex(-mixer.nu_log.exp(), mixer.theta_log.exp()))
    with torch.no_grad():
        mixer.B.copy_(torch.view_as_real((1 + decay)[:, None] * torch.view_as_complex(mixer.B)))
        mixer.nu_log += math.log(2)
        mixer.theta_log += math.log(2)
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterator[Batch]) -> float:
    right, total = 0, 0
    for x, timeline, labels in batches:
        right += int((model(x, timeline).argmax(1) == labels).sum())
        total += len(labels)
    return right / total


def train(model: Classifier, batches: Iterator[Batch], minutes: float, rate: float) -> tuple[int, float]:
    """Train for minutes of processor time; return steps and seconds."""
    optimizer, losses = adamw(model, rate, 0.05), []
    begin, step, spent, said = time.process_time(), 0, 0.0, 0.0
    while spent < 60 * minutes:
        set_rates(optimizer.param_groups, rate_factor(spent / 60 / minutes, 0.05))
        x, timeline, labels = next(batches)
        loss = functional.cross_entropy(model(x, timeline), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step, spent = step + 1, time.process_time() - begin
        if spent - said > 30:
            print(f"{spent:5.0f} s, step {step}, loss {sum(losses[-100:]) / len(losses[-100:]):.4f}", flush=True)
            said = spent
    return step, spent


def main() -> None:
    """Train, test, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=MIXERS)
    parser.add_argument("--mixer", default="s5", choices=MIXERS["fsdd"])
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=5e-3, help="largest learning rate")
    parser.add_argument("--out", help="a file to which the JSON line is appended")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build(options.task, options.mixer)
    source: Callable[[int], Iterator[Batch]] = pictures if options.task == "smnist" else sounds
    wall = time.perf_counter()
    steps, seconds = train(model, source(options.seed), options.minutes, options.rate)
    wall = time.perf_counter() - wall
    model.eval()
    found: dict[str, Any] = {"task": options.task, "mixer": options.mixer, "seed": options.seed}
    if options.task == "smnist":
        found["accuracy"] = accuracy(model, held_pictures())
    else:
        found["accuracy"] = accuracy(model, held_sounds())
        lru = isinstance(model.stacks[0].layers[0].mixer, LRU)
        half = at_half_rate(model) if lru else model
        found["accuracy_4khz"] = accuracy(half, held_sounds(2, 1.0 if lru else 2.0))
        if not lru:
            found["accuracy_4khz_without_dt"] = accuracy(model, held_sounds(2))
    found |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": round(steps * BATCH[options.task] / {"smnist": 60000, "fsdd": 2700}[options.task], 2),
        "cpu_seconds": round(seconds),
        "wall_seconds": round(wall),
        "threads": 1,
        "machine": f"{platform.machine()}, torch {torch.__version__}, longstate {longstate.__version__}, float32",
        "config": model.config,
    }
    line = json.dumps(found)
    print(line)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
