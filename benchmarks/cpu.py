"""Speed on a CPU: ours, transformers, mambapy and llama.cpp on the same weights, in one run; prints Markdown.

    python benchmarks/cpu.py [--only prefill,decode,train,mamba2,scan,length,import] [--repeats 5] [--quick]

Peers, as far as they are installed: pip install transformers mambapy gguf llama-cpp-python (the last is compiled).
Models: a Mamba and a Mamba-2 of 130M parameters, random weights, written once in the layout of transformers (into
--folder, or a temporary one: 2 GB) and read by all sides; where their logits or gradients differ from ours by more
than rounding, the run ends. What is compared is timed in turn, round by round, after one round that does not count,
since the speed of a machine wanders; a table shows the median (least–most) of the rounds, and ratios are medians of
the ratios within each round. One training step of transformers without mambapy takes minutes: it is measured once,
without warming up. The whole takes tens of minutes, so parts can be run one by one; --quick (two layers, few tokens)
shows that all of it works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from measure import difference, memory, peak, ratio, read_bandwidth, rounds, spread, table, timed, weight_bytes
from peers import LlamaCpp, Longstate, Transformers, opened, parameters, random_tokens, versions
from torch.nn import functional

import longstate
from longstate import native, ops

LAYERS = {"mamba": {"mixer": "mamba"}, "mamba2": {"mixer": "mamba2", "d_state": 128, "head_dim": 64}}


class Sizes(NamedTuple):
    """How much is measured."""

    layers: int = 24
    prefill: int = 512
    steps: int = 32
    train: int = 256
    scan: int = 2048
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)


QUICK = Sizes(2, 48, 4, 32, 128, (64, 128, 256))


class Run(NamedTuple):
    """What a part needs to know."""

    sizes: Sizes
    repeats: int
    folder: Path

    def model(self, name: str) -> Path:
        """Return the folder of a model, written if it is not there."""
        folder = self.folder / f"{name}-{self.sizes.layers}"
        if not folder.exists():
            torch.manual_seed(0)
            model = longstate.LanguageModel(50280, 768, [LAYERS[name]] * self.sizes.layers)
            longstate.save(model, folder, family=name)
        return folder


def prefill(run: Run, name: str = "mamba", narrow: bool = True) -> None:
    """Read a text from the initial state: logits of all tokens, or of the last alone."""
    length = run.sizes.prefill
    print(f"### {name}: prefill of {length} tokens\n")
    dtypes = ("float32", "bfloat16") if narrow else ("float32",)
    peers = [(who, dtype) for dtype in dtypes for who in ("Longstate", "transformers")]
    peers += [("llama.cpp", "f32"), ("llama.cpp", "f16")] if narrow else []
    models, absent = opened(run.model(name), peers, max(length, 512))
    tokens, rows = random_tokens(1, length), []
    for logits, last in (("all", False), ("last", True)):
        ours = models["Longstate", "float32"].prefill(tokens, last)
        checks = {key: difference(model.prefill(tokens, last), ours, key[1]) for key, model in models.items()}
        times = rounds({key: timed(model.prefill, tokens, last) for key, model in models.items()}, run.repeats)
        for (peer, dtype), seconds in times.items():
            same = times["Longstate", "bfloat16" if dtype in ("bfloat16", "f16") else "float32"]
            rate = spread(length / x for x in seconds)
            rows.append([peer, dtype, logits, rate, f"{ratio(seconds, same):.2f} ×", checks[peer, dtype]])
    head = ("", "type", "logits", "tokens/s", "Longstate is faster by", "difference of the logits")
    table(head, *rows, *([*row[:2], "", row[2], "", ""] for row in absent))


def decode(run: Run, name: str = "mamba", narrow: bool = True) -> None:
    """Read one token at a time, beside the time that reading the weights takes."""
    steps = run.sizes.steps
    print(f"### {name}: decoding, one token at a time ({steps} in a row)\n")
    dtypes = ("float32", "bfloat16") if narrow else ("float32",)
    peers = [(who, dtype) for dtype in dtypes for who in ("Longstate", "transformers")]
    peers += [("Longstate", "int8"), ("llama.cpp", "f32"), ("llama.cpp", "f16")] if narrow else []
    models, absent = opened(run.model(name), peers, 512)
    wide = [(*key, 4) for key in models if narrow and key[0] == "Longstate"]
    tokens, checks, contenders = random_tokens(4, 8), {}, {}
    ours = models["Longstate", "float32"].prefill(tokens, True)

    def several(model: Longstate | Transformers | LlamaCpp, token: torch.Tensor) -> float:
        model.restart()
        model.step(token)
        begin = time.perf_counter()
        for _ in range(steps):
            model.step(token)
        return (time.perf_counter() - begin) / steps

    for peer, dtype, batch in [*((*key, 1) for key in models), *wide]:
        model = models[peer, dtype]
        model.restart()
        logits = [model.step(token) for token in tokens[:batch].split(1, 1)][-1]
        checks[peer, dtype, batch] = difference(logits, ours[:batch], dtype)
        contenders[peer, dtype, batch] = partial(several, model, tokens[:batch, :1])
    buffer = memory(2**30 if run.sizes != QUICK else 2**24)
    times = rounds({"memory": partial(read_bandwidth, buffer), **contenders}, run.repeats)
    bandwidth = times.pop("memory")
    base, rows = times["Longstate", "float32", 1], []
    for (peer, dtype, batch), seconds in times.items():
        size = weight_bytes(models[peer, dtype].model) if peer == "Longstate" else None
        limit = f"{ratio([size / x for x in bandwidth], seconds):.0%}" if size else ""
        read = f"{size / 1e6:.0f}" if size else ""
        rate = spread(batch / x for x in seconds)
        relative = f"{batch * ratio(base, seconds):.2f} ×"
        rows.append([peer, dtype, batch, rate, relative, read, limit, checks[peer, dtype, batch]])
    head = ("", "type", "batch", "tokens/s", "of Longstate float32", "weights, MB", "of the memory limit", "difference")
    table(head, *rows, *([*row[:2], 1, row[2], "", "", "", ""] for row in absent))
    print(f"Memory is read at {spread(x / 1e9 for x in bandwidth)} GB/s; the limit is that over the weights.\n")


def train(run: Run, name: str = "mamba") -> None:
    """Run forward and backward of the mean cross-entropy; no optimiser on any side."""
    length = run.sizes.train
    print(f"### {name}: training step of {length} tokens, forward and backward, float32\n")
    peers = ("Longstate", "transformers", *(["mambapy"] if name == "mamba" else []))
    models, absent = opened(run.model(name), [(peer, "float32") for peer in peers], length)
    tokens = random_tokens(1, length + 1)

    def step(peer: Longstate | Transformers) -> float:
        model = peer.model.train()
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        output = model(tokens[:, :-1])
        logits = output[0] if isinstance(peer, Longstate) else output.logits
        # Not logits[0], whose gradient fills a tensor with zeros first, on all sides.
        functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:]).backward()
        return time.perf_counter() - begin

    slow = [key for key in models if key[0] == "transformers"] if name == "mamba" else []
    times = rounds({key: partial(step, model) for key, model in models.items()}, run.repeats, once=slow)
    ours, base, rows = parameters(models["Longstate", "float32"].model), times["Longstate", "float32"], []
    for (peer, _), seconds in times.items():
        # All gradients are those of the last step.
        grads = {n: p.grad for n, p in parameters(models[peer, "float32"].model).items()}
        worst = max((difference(grads[n], p.grad, "gradient") for n, p in ours.items()), key=float)
        label = {"mambapy": "transformers with mambapy"}.get(peer, peer)
        rows.append([label, spread(seconds, 2), f"{ratio(seconds, base):.1f} ×", worst])
    head = ("", "seconds", "Longstate is faster by", "largest difference of a gradient")
    table(head, *rows, *((peer, why, "", "") for peer, _, why in absent))


def mamba2(run: Run) -> None:
    """Do the same with Mamba-2, in float32."""
    prefill(run, "mamba2", narrow=False)
    decode(run, "mamba2", narrow=False)
    train(run, "mamba2")


def scan(run: Run) -> None:
    """Run the selective scan alone."""
    length, width, n = run.sizes.scan, 1536, 16
    print(f"### selective_scan alone: B=1 L={length} D={width} N={n}, float32\n")
    torch.manual_seed(0)
    u, dt = torch.randn(1, length, width), torch.rand(1, length, width) / 10
    A, B, C = -torch.arange(1.0, n + 1).repeat(width, 1), torch.randn(1, length, n), torch.randn(1, length, n)
    inputs = [x.requires_grad_() for x in (u, dt, A, B, C, torch.ones(width))]
    grad = torch.randn(1, length, width)

    def backward() -> float:
        y, _ = ops.selective_scan(*inputs)
        begin = time.perf_counter()
        torch.autograd.grad(y, inputs, grad)
        return time.perf_counter() - begin

    @torch.no_grad()
    def forward() -> None:
        ops.selective_scan(*inputs)

    times = rounds({"forward": forward, "backward": backward}, 4 * run.repeats)
    updates = length * width * n
    rows = [
        (
            name,
            spread(1e3 * x for x in seconds),
            spread((updates / x / 1e9 for x in seconds), 2),
            f"{ratio(seconds, times['forward']):.2f} ×",
        )
        for name, seconds in times.items()
    ]
    table(("", "ms", "10⁹ state updates/s", "of forward"), *rows)


def length(run: Run) -> None:
    """Read short and long texts in one call, logits of the last token: time in turn, memory in fresh processes."""
    short, *_, long = run.sizes.lengths
    print(f"### mamba: prefill of {long} tokens against {short}, in one call, float32, logits of the last token\n")
    model = Longstate(run.model("mamba"), "float32")
    calls = {n: timed(model.prefill, random_tokens(1, n), True) for n in (short, long)}
    times = rounds(calls, run.repeats)
    each = {n: [1e6 * x / n for x in seconds] for n, seconds in times.items()}
    rows = [(n, spread(x, 0), f"{ratio(x, each[short]) - 1:+.1%}") for n, x in each.items()]
    table(("tokens", "µs per token", f"over {short}"), *rows)
    table(("tokens", "MiB", "KiB per token more", "MiB, as the allocator comes"), *peaks(run))


def peaks(run: Run) -> list[tuple[object, ...]]:
    """Return the peaks of memory over that of 64 tokens, in fresh processes: with an allocator that gives back what is
    freed (glibc's keeps pieces of up to 32 MB, and what lies between them is lost for larger ones), and as it comes."""
    found: dict[int, list[int]] = {}
    for n in run.sizes.lengths:
        threads = str(torch.get_num_threads())
        command = [sys.executable, __file__, "--threads", threads, "--peak", str(run.model("mamba")), str(n)]
        for more in ({"MALLOC_MMAP_THRESHOLD_": str(2**22)}, {}):
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **more})
            found.setdefault(n, []).append(json.loads(done.stdout))
    rows: list[tuple[object, ...]] = []
    for before, n in zip((0, *found), found, strict=False):
        slope = f"{(found[n][0] - found[before][0]) / (n - before) / 1024:.1f}" if before else ""
        rows.append((n, f"{found[n][0] / 2**20:.0f}", slope, f"{found[n][1] / 2**20:.0f}"))
    return rows


def peak_memory(folder: Path, length: int) -> int:
    """Return the bytes that reading so many tokens adds to the peak of resident memory."""
    model = Longstate(folder, "float32")
    model.prefill(random_tokens(1, 64), True)
    before = peak()
    model.prefill(random_tokens(1, length), True)
    return peak() - before


def import_(run: Run) -> None:
    """Import in fresh processes, from bytecode as an installed package has it, and from text."""
    print("### import longstate beyond import torch\n")
    # The round that does not count writes the bytecode where there is none yet, unless the environment forbids it.
    here = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def imported(code: str) -> float:
        command = [sys.executable, "-c", IMPORTS.format(code)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=here).stdout)

    titles = {
        "import torch": "import torch",
        "import torch; begin = now(); import longstate": "import longstate, after it",
        f"import torch; {FROM_TEXT}; begin = now(); import longstate": "the same where Python has kept no bytecode",
    }
    times = rounds({title: partial(imported, code) for code, title in titles.items()}, run.repeats)
    table(("", "seconds"), *((title, spread(seconds, 3)) for title, seconds in times.items()))


IMPORTS = "from time import perf_counter as now; begin = now(); {}; print(now() - begin)"
# In an empty folder nothing is found, and nothing is written there either.
FROM_TEXT = "import sys; sys.pycache_prefix, sys.dont_write_bytecode = '/nonexistent', True"
PARTS = {part.__name__.rstrip("_"): part for part in (prefill, decode, train, mamba2, scan, length, import_)}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_memory(Path(arguments.peak[0]), int(arguments.peak[1])))
        return
    if unknown := [x for x in arguments.only.split(",") if x not in PARTS]:
        parser.error(f"--only: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    kernels = f"compiled kernels for {native.instructions()}" if native.kernels else f"no kernels: {native.reason}"
    print(
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {arguments.threads} threads, {kernels};"
    )
    print(f"Python {platform.python_version()}, {versions()}. {arguments.repeats} rounds.\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        sizes = QUICK if arguments.quick else Sizes()
        run = Run(sizes, arguments.repeats, arguments.folder or Path(temporary))
        for part in arguments.only.split(","):
            PARTS[part](run)


if __name__ == "__main__":
    main()
