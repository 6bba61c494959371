"""Synthetic tasks that tell families of models apart, each within a minute or two of one core.

    python benchmarks/tasks.py [delay copying autoregressive lorenz] [--seconds 20]

delay           What a memory holds: band-limited noise, given back 250 steps later by a linear layer of 64 states.
                First with the states as they are initialised and the best linear readout (least squares), then with
                everything trained. Errors are parts of the signal's variance: 0 is perfect, 1 is nothing.
copying         Ten symbols of eight, to be repeated after a gap: two layers and an embedding. Accuracy; chance is 1/8.
autoregressive  The next value of an AR(p) series: one linear layer of p states. Excess of the mean squared error over
                that of the true coefficients, which is 1; also for the line of the last p values, by least squares.
lorenz          The next point of Lorenz' system at dt = 0.02, then the model left to itself: how long, in Lyapunov
                times of 1/0.906, until the error is 0.4 of the attractor's size.

Every model of a task is trained for the same seconds of processor time on one thread; "of the same size" means equal
numbers of states. Each row says what came out, whichever way it falls.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import longstate
from longstate import S4D, LanguageModel, Stack, systems
from longstate.bench import Task, autoregressive, copying, delay, lorenz, stable_coefficients
from longstate.mixers import MIXERS
from longstate.train.optimizer import adamw, rate_factor, set_rates

LENGTH, LAG, BAND, STATES = 1000, 250, 0.02, 64


def train(
    model: nn.Module, loss: Callable[[Task], Tensor], batches: Iterator[Task], seconds: float, rate: float
) -> int:
    """Train for seconds of processor time; return the steps."""
    optimizer = adamw(model, rate, 0.0)
    begin, step, spent = time.process_time(), 0, 0.0
    while spent < seconds:
        set_rates(optimizer.param_groups, rate_factor(spent / seconds, 0.05))
        optimizer.zero_grad()
        value = loss(next(batches))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, spent = step + 1, time.process_time() - begin
    return step


def repeated(make: Callable[[np.random.Generator], Task], seed: int = 0) -> Iterator[Task]:
    random = np.random.default_rng(seed)
    while True:
        yield make(random)


# Delay


def memories(random: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return discrete systems (A, B) of ``STATES`` real states, or half as many complex ones."""
    n, step = STATES, 1 / LENGTH
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, measure in (("HiPPO-LegS, dense", systems.legs), ("HiPPO-LegT, dense", systems.legt)):
        A, B = measure(n)[:2]
        dense = systems.zoh(A, B.reshape(n, -1), 4 * step if measure is systems.legs else 2 * step)
        found[name] = np.asarray(dense[0]), np.asarray(dense[1])[:, 0]
    for name in ("legs", "lin", "inv", "quad"):
        layer = S4D(1, n, initialization=name)
        A = torch.view_as_complex(torch.stack([-layer.A_real.exp(), layer.A_imag], -1))[0].detach().numpy()
        found[f"S4D-{name}"] = np.diag(np.exp(4 * step * A)), np.ones(n // 2)
    decays = -np.exp(random.standard_normal(n // 2)) + 1j * random.standard_normal(n // 2)
    found["random diagonal"] = np.diag(np.exp(4 * step * decays)), np.ones(n // 2)
    dense = random.standard_normal((n, n)) / np.sqrt(n)
    found["random orthogonal"] = np.linalg.qr(dense)[0], random.standard_normal(n)
    found["random Gaussian, radius 0.99"] = 0.99 * dense / max(abs(np.linalg.eigvals(dense))), random.standard_normal(n)
    return found


def readout_error(A: np.ndarray, B: np.ndarray, train_set: Task, test_set: Task) -> float:
    """Return the error of the best linear readout of a system's states, fitted to one set, on another."""

    def features(task: Task) -> tuple[np.ndarray, np.ndarray]:
        h, rows = np.zeros((len(task.x), len(A)), dtype=complex), []
        for t in range(task.x.shape[1]):
            h = h @ A.T + task.x[:, t].double().numpy() * B
            rows.append(h)
        states = np.stack(rows, 1)[:, 2 * LAG :].reshape(-1, len(A))
        both = np.concatenate([states.real, states.imag], 1) if np.iscomplexobj(A) else states.real
        return both, task.y[:, 2 * LAG :].double().numpy().reshape(-1)

    states, wanted = features(train_set)
    scale = np.sqrt((states**2).mean(0)) + 1e-12
    # A little noise on each state: what needs more than four digits of them is no memory.
    damped = np.concatenate([states / scale, 1e-4 * np.sqrt(len(states)) * np.eye(states.shape[1])])
    weights = np.linalg.lstsq(damped, np.concatenate([wanted, np.zeros(states.shape[1])]), rcond=None)[0]
    states, wanted = features(test_set)
    return float(((states / scale @ weights - wanted) ** 2).mean() / (wanted**2).mean())


def delay_error(model: nn.Module, task: Task) -> Tensor:
    wanted = task.y[:, 2 * LAG :]
    return (model(task.x)[0][:, 2 * LAG :] - wanted).square().mean() / wanted.square().mean()


def run_delay(seconds: float) -> None:
    random = np.random.default_rng(1)
    make = lambda r: delay(r, 8, LENGTH, LAG, BAND)  # noqa: E731
    train_set, test_set = make(random), make(random)
    print(f"delay: {LENGTH} steps, lag {LAG}, band {BAND} cycles/step, {STATES} real states, one channel")
    for name, (A, B) in memories(random).items():
        print(f"  best readout, {name:30s} error {readout_error(A, B, train_set, test_set):.4f}", flush=True)
    for name in ("legs", "lin", "inv", "quad", "random"):
        torch.manual_seed(0)
        first = "legs" if name == "random" else name
        model = S4D(1, STATES, initialization=first, dt_min=4 / LENGTH, dt_max=4 / LENGTH, output="identity")
        if name == "random":
            with torch.no_grad():
                model.A_real.normal_()
                model.A_imag.normal_()
        error = partial(delay_error, model)
        steps = train(model, error, repeated(make), seconds, 1e-2)
        with torch.inference_mode():
            print(f"  trained, S4D-{name:8s} {steps:5d} steps, error {float(error(test_set)):.4f}", flush=True)


# Copying


def run_copying(seconds: float) -> None:
    for gap in (50, 200):
        make = lambda r, g=gap: copying(r, 32, 10, 8, g)  # noqa: E731
        test_set = copying(np.random.default_rng(1), 500, 10, 8, gap)
        print(f"copying: 10 symbols of 8, gap {gap}, chance 0.125")
        layers: dict[str, dict[str, Any]] = {
            "LRU": {"mixer": "lru", "d_state": 128, "r_min": 0.99, "r_max": 0.9999},
            "S5": {"mixer": "s5", "d_state": 128, "dt_min": 1 / (gap + 20)},
            "S4D": {"mixer": "s4d", "d_state": 32, "dt_min": 1 / (gap + 20)},
            "Mamba-2": {"mixer": "mamba2", "d_state": 32, "head_dim": 32},
        }
        for name, layer in layers.items():
            torch.manual_seed(0)
            model = LanguageModel(10, 64, [layer] * 2)
            steps = train(model, lambda task, m=model: m.loss(*task)[0], repeated(make), 3 * seconds, 5e-3)
            with torch.inference_mode():
                asked = test_set.y >= 0
                right = float((model(test_set.x)[0].argmax(-1) == test_set.y)[asked].float().mean())
            print(f"  {name:8s} {steps:5d} steps, accuracy {right:.3f}", flush=True)


# Autoregressive series


def series_error(model: nn.Module, order: int, scale: float, task: Task) -> Tensor:
    return (model(task.x / scale)[0] - task.y / scale)[:, order:].square().mean()


def run_autoregressive(seconds: float) -> None:
    for order in (4, 8, 16):
        random = np.random.default_rng(order)
        coefficients = stable_coefficients(random, order, 0.6, 0.9)
        make = lambda r, a=coefficients: autoregressive(r, 16, 256, a)  # noqa: E731
        test_set = autoregressive(np.random.default_rng(99), 200, 256, coefficients)
        x, wanted = test_set.x[..., 0].double(), test_set.y[:, order:, 0].double()
        scale = float(x.std())
        lags = torch.stack([x[:, order - i : 256 - i] for i in range(order)], -1)
        floor = float((lags @ torch.from_numpy(coefficients.copy()) - wanted).square().mean())
        line = torch.linalg.lstsq(lags.flatten(0, 1), wanted.flatten()).solution
        fitted = float((lags @ line - wanted).square().mean())
        print(f"AR({order}): variance {scale**2:.1f}, noise {floor:.3f}, line of {order} values {fitted - floor:+.3f}")
        layers: dict[str, dict[str, Any]] = {
            "S4D": {"mixer": "s4d", "d_state": 2 * -(-order // 2), "output": "identity", "dt_max": 1.0},
            "S4D-real": {
                "mixer": "s4d",
                "d_state": order,
                "initialization": "real",
                "output": "identity",
                "dt_max": 1.0,
            },
            "SpaceTime": {"mixer": "spacetime", "d_state": order, "output": "identity"},
        }
        for name, layer in layers.items():
            if layer["mixer"] not in MIXERS:
                continue
            torch.manual_seed(0)
            options = dict(layer)
            model = MIXERS[options.pop("mixer")](1, **options)
            error = partial(series_error, model, order, scale)
            steps = train(model, error, repeated(make), seconds, 1e-2)
            with torch.inference_mode():
                print(
                    f"  {name:10s} {steps:5d} steps, excess {float(error(test_set)) * scale**2 - floor:+.3f}",
                    flush=True,
                )


# Lorenz


class Predictor(nn.Module):
    """The next point, as the present one and a change."""

    def __init__(self, layer: dict[str, Any], width: int = 64) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, width), nn.Linear(width, 3)
        self.stack = Stack(width, [layer] * 2, {"hidden": 128})

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.stack(self.encoder(x), state)
        return x + 0.1 * self.head(y), state


def run_lorenz(seconds: float) -> None:
    dt, warm = 0.02, 100
    path = lorenz(np.random.default_rng(0), 80, 1000, dt)
    path = (path - path.mean((0, 1))) / path.std((0, 1))
    train_set, test_set = path[:64], path[64:]
    naive = float((test_set[:, 1:] - test_set[:, :-1]).square().mean())
    print(f"lorenz: dt {dt}, one-step mean squared error of no change {naive:.2e}")

    def windows(random: np.random.Generator) -> Task:
        begin = random.integers(0, 1000 - 129, 32)
        cut = torch.stack([train_set[i, b : b + 129] for i, b in zip(random.integers(0, 64, 32), begin, strict=True)])
        return Task(cut[:, :-1], cut[:, 1:])

    layers: dict[str, dict[str, Any]] = {
        "S4D": {"mixer": "s4d", "d_state": 16},
        "S5": {"mixer": "s5", "d_state": 64},
        "LRU": {"mixer": "lru", "d_state": 64},
        "SpaceTime": {"mixer": "spacetime", "d_state": 16, "differences": (0, 1)},
    }
    for name, layer in layers.items():
        if layer["mixer"] not in MIXERS:
            continue
        torch.manual_seed(0)
        model = Predictor(layer)
        loss = lambda task, m=model: (m(task.x)[0] - task.y)[:, 16:].square().mean() / naive  # noqa: E731
        steps = train(model, loss, repeated(windows), 3 * seconds, 3e-3)
        with torch.inference_mode():
            one = float((model(test_set[:, :-1])[0] - test_set[:, 1:])[:, 16:].square().mean())
            y, state = model(test_set[:, :warm])
            point, free = y[:, -1:], []
            for _ in range(600):
                free.append(point)
                point, state = model(point, state)
            wrong = (torch.cat(free, 1) - test_set[:, warm : warm + 600]).square().mean(-1).sqrt() > 0.4
            held = torch.where(wrong.any(1), wrong.int().argmax(1), 600) * dt * 0.906
        print(
            f"  {name:10s} {steps:5d} steps, one step {one:.2e}, left to itself {float(held.median()):.2f} Lyapunov "
            f"times (median of 16; {float(held.min()):.2f} to {float(held.max()):.2f})",
            flush=True,
        )


TASKS = {"delay": run_delay, "copying": run_copying, "autoregressive": run_autoregressive, "lorenz": run_lorenz}


def main() -> None:
    """Run the tasks and print what each model reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=[])
    parser.add_argument("--seconds", type=float, default=10.0, help="of training for the smallest models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"1 thread, {platform.machine()}, torch {torch.__version__}, longstate {longstate.__version__}, float32")
    for name in options.tasks or TASKS:
        TASKS[name](options.seconds)


if __name__ == "__main__":
    main()
