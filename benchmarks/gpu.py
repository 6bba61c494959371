"""Speed on a GPU: every kernel beside its floor and its peers, decoding, and training; prints Markdown.

    python benchmarks/gpu.py [--only PART,…] [--ops scan,…] [--shapes b8] [--peers fla,…] [--repeats 20] [--quick]

Parts: start, kernels, products, decode, train, attention. Peers, as far as they are installed: fla (pip install
fla-core), mamba-ssm, causal-conv1d, transformers, torch; --peers none is ours alone. fla tries hundreds of
configurations for each shape, which may take a quarter of an hour for an op: --shapes takes those with such a part in
their names. Rows are printed as they are found, and the rest goes on where a part or a peer fails; if it was ours, or
an error of ours is larger than 0.05 of the largest number, the script ends with a status that says so.

First the ceilings of the machine are measured: a copy of 4 GiB (bytes read and written) and a product of 8192 × 8192
matrices in bfloat16. "start" times the first call of every kernel in a process of its own that finds nothing compiled.
Then each kernel is checked against the same op in float64 (another algorithm) on fresh random numbers, in memory that
is filled with not-a-number beforehand, outputs and all gradients, and timed in bfloat16: by events around the replay of
a CUDA graph, so that nothing of Python is measured, after the caches have been written over; medians of the repeats.
The floor is the longer of two times: that of its bytes, each input read and each output written once, at the speed of
the copy, and that of its products at the speed of the matrix product.

--quick takes few small shapes, on a CPU too by its own kernels, which shows that the script runs; figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import weight_bytes
from torch import Tensor
from torch.nn import functional

from longstate import LanguageModel, ops
from longstate import state as states
from longstate.bench import _timing as timing
from longstate.models.captured import CapturedStep

PEERS = ("fla-core", "mamba-ssm", "causal-conv1d", "transformers", "triton")


class Machine(NamedTuple):
    """Where is measured, how fast it copies (bytes/s) and multiplies (operations/s), how often, and beside whom."""

    device: torch.device
    copies: float
    multiplies: float
    repeats: int
    quick: bool
    peers: str


class Problem(NamedTuple):
    """One op on one shape.

    Attributes:
        shape: In words.
        call: Computes (y, …) from the tensors below.
        given: Tensors in bfloat16 or float32, of which gradients are taken.
        products: Operations of matrix products that the recurrence itself has, forward and backward.
        peers: The same by other libraries, from the same tensors.
    """

    shape: str
    call: Callable[..., Any]
    given: dict[str, Tensor]
    products: tuple[float, float]
    peers: dict[str, Callable[..., Any]]


# ------------------------------------------------------------------------------------------------------------ measuring


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that torch hands out uninitialised with not-a-number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def seconds(machine: Machine, call: Callable[[], Any]) -> tuple[float, str]:
    """Return the median time of a call, and "" or why it is not that of its kernels alone."""
    return timing.seconds(machine.device, call, machine.repeats)


def row(*cells: object) -> None:
    """Print a row of a table at once: what comes after it may fail."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@contextlib.contextmanager
def rows(title: str, *head: str) -> Iterator[None]:
    """Print the head of a table and, at the end, what ends it."""
    print(f"### {title}\n")
    row(*head)
    row(*["---"] * len(head))
    try:
        yield
    finally:
        print(flush=True)


def reason(error: Exception) -> str:
    """Return an error in a few words."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.80}"


def beside(m: Machine, *names: str) -> list[str]:
    """Return which of some peers are asked for and installed."""
    asked = [name for name in names if not m.peers or name in m.peers.split(",")]
    return [name for name in asked if name == "torch" or find_spec(name.replace("-", "_")) is not None]


def ceilings(device: torch.device, repeats: int, quick: bool, peers: str) -> Machine:
    """Measure how fast memory is copied and matrices are multiplied."""
    machine = Machine(device, 1.0, 1.0, repeats, quick, peers)
    size, side = (1 << 20, 256) if quick else (1 << 31, 8192)
    x = torch.randn(size // 4, device=device)
    y = torch.empty_like(x)
    copy, _ = seconds(machine, lambda: y.copy_(x))
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, _ = seconds(machine, lambda: a @ b)
    return machine._replace(copies=2 * size / copy, multiplies=2 * side**3 / product)


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ------------------------------------------------------------------------------------------------------------- problems


def randn(machine: Machine, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=machine.device, dtype=dtype)


def scan(m: Machine, b: int, t: int, d: int) -> Problem:
    a = torch.rand(b, t, d, device=m.device).mul_(0.2).add_(0.8)
    return Problem(f"b{b} t{t} d{d}", ops.scan, dict(a=a, b=randn(m, b, t, d, dtype=torch.float32)), (0, 0), {})


def selective_scan(m: Machine, b: int, t: int, d: int, n: int = 16) -> Problem:
    given = {name: randn(m, b, t, d) for name in ("u", "dt", "gate")}
    given |= {name: randn(m, b, t, n) for name in ("B", "C")}
    given["A"] = torch.log(1 + torch.arange(n, device=m.device, dtype=torch.float32)).repeat(d, 1)
    given |= {"D": torch.ones(d, device=m.device), "dt_bias": randn(m, d, dtype=torch.float32) - 4}

    def ours(**x: Tensor) -> Any:
        return ops.selective_scan(**x, dt_softplus=True, log_A=True)

    def mamba(**x: Tensor) -> Any:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        rows = {name: x[name].mT for name in ("u", "dt", "gate", "B", "C")}
        u, dt, gate, B, C = rows.values()
        bias = x["dt_bias"]
        y = selective_scan_fn(u, dt, -x["A"].exp(), B[:, None], C[:, None], x["D"], gate, bias, delta_softplus=True)
        return (y.mT,)

    return Problem(f"b{b} t{t} d{d} n{n}", ours, given, (0, 0), {"mamba-ssm": mamba})


def linear_attention(m: Machine, kind: str, b: int, t: int, h: int, k: int, p: int, g: int = 0) -> Problem:
    g = g or h
    given = dict(q=randn(m, b, t, g, k), k=randn(m, b, t, g, k), v=randn(m, b, t, h, p))
    given = {name: x / k**0.25 if name in "qk" else x for name, x in given.items()}
    shapes: dict[str, tuple[int, ...]] = {"none": (), "head": (h,), "step": (b, t, h), "channel": (b, t, h, k)}
    if kind != "none":
        given["log_decay"] = -torch.rand(shapes[kind], device=m.device) / 8

    def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Any:
        from fla.ops.simple_gla import chunk_simple_gla

        q, k = (x.repeat_interleave(h // g, 2) for x in (q, k))
        fixed = dict(g_gamma=log_decay) if kind == "head" else dict(g=log_decay)
        return chunk_simple_gla(q, k, v, scale=1.0, output_final_state=True, **fixed)

    def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Any:
        from fla.ops.gla import chunk_gla

        return chunk_gla(q, k, v, log_decay, scale=1.0, output_final_state=True)

    def ssd(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Any:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        # Its decay is Δ A with A for each head: −1, and Δ = −g; it writes Δ v, so that v / Δ comes.
        dt = -log_decay
        x = (v / dt[..., None]).to(v.dtype)
        return (mamba_chunk_scan_combined(x, dt, torch.full((h,), -1.0, device=v.device), k, q, chunk_size=256),)

    peers = {"fla": gla if kind == "channel" else simple_gla} | ({"mamba-ssm": ssd} if kind == "step" else {})
    work = 2.0 * b * t * h * k * p
    shape = f"{kind}: b{b} t{t} h{h} k{k} p{p}" + (f" g{g}" if g != h else "")
    return Problem(shape, ops.linear_attention, given, (2 * work, 5 * work), peers)


def delta_rule(m: Machine, kind: str, b: int, t: int, h: int, k: int, p: int) -> Problem:
    given = linear_attention(m, kind, b, t, h, k, p).given
    given = {
        name: functional.normalize(x.float(), dim=-1).bfloat16() if name in "qk" else x for name, x in given.items()
    }
    given["beta"] = torch.rand(b, t, h, device=m.device, dtype=torch.bfloat16)

    def fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Any:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda

        if kind == "none":
            return chunk_delta_rule(q, k, v, beta, scale=1.0, output_final_state=True)
        by_step = chunk_kda if kind == "channel" else chunk_gated_delta_rule
        return by_step(q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, output_final_state=True)

    work = 2.0 * b * t * h * k * p
    return Problem(f"{kind}: b{b} t{t} h{h} k{k} p{p}", ops.delta_rule, given, (3 * work, 8 * work), {"fla": fla})


def short(m: Machine, b: int, t: int, d: int, taps: int = 4) -> Problem:
    given = dict(u=randn(m, b, t, d), weight=randn(m, d, taps), bias=randn(m, d))

    def ours(**x: Tensor) -> Any:
        return ops.convolution.short(**x, activation="silu")

    def causal(u: Tensor, weight: Tensor, bias: Tensor) -> Any:
        from causal_conv1d import causal_conv1d_fn

        return (causal_conv1d_fn(u.mT, weight, bias, activation="silu").mT,)

    def fla(u: Tensor, weight: Tensor, bias: Tensor) -> Any:
        from fla.modules.causal_conv1d import causal_conv1d

        return causal_conv1d(u, weight, bias, activation="silu")

    return Problem(f"b{b} t{t} d{d} k{taps}", ours, given, (0, 0), {"causal-conv1d": causal, "fla": fla})


def rms_norm(m: Machine, rows: int, d: int, gated: bool) -> Problem:
    given = dict(x=randn(m, rows, d), weight=randn(m, d)) | ({"gate": randn(m, rows, d)} if gated else {})

    def ours(**x: Tensor) -> Any:
        return (ops.rms_norm(**x),)

    def torch_(x: Tensor, weight: Tensor) -> Any:
        return (functional.rms_norm(x, x.shape[-1:], weight, 1e-5),)

    return Problem(f"{'gated: ' if gated else ''}{rows} × {d}", ours, given, (0, 0), {} if gated else {"torch": torch_})


def vandermonde(m: Machine, d: int, n: int, length: int) -> Problem:
    weights = torch.randn(d, n, 2, device=m.device)
    z = torch.stack([-torch.rand(d, n, device=m.device) / 100, torch.rand(d, n, device=m.device)], -1).double()

    def ours(weights: Tensor, z: Tensor) -> Any:
        return (ops.vandermonde(torch.view_as_complex(weights), torch.view_as_complex(z), length),)

    return Problem(f"d{d} n{n} l{length}", ours, dict(weights=weights, z=z), (0, 0), {})


def problems(m: Machine) -> dict[str, list[Problem]]:
    """Return the shapes of models of 130M, 1.3B and 7B parameters, in training and with long inputs."""
    if m.quick:
        return {
            "scan": [scan(m, 2, 24, 16)],
            "selective_scan": [selective_scan(m, 2, 24, 16, 4)],
            "linear_attention": [linear_attention(m, x, 1, 24, 2, 16, 16) for x in ("none", "head", "step", "channel")],
            "delta_rule": [delta_rule(m, x, 1, 24, 2, 16, 16) for x in ("none", "step", "channel")],
            "short": [short(m, 2, 24, 16)],
            "rms_norm": [rms_norm(m, 24, 64, gated) for gated in (False, True)],
            "vandermonde": [vandermonde(m, 4, 8, 64)],
        }
    lengths = [(8, 2048), (1, 512), (1, 4096), (1, 16384), (1, 131072)]
    attention = [linear_attention(m, "step", b, t, 24, 128, 64, 1) for b, t in lengths]
    attention += [
        linear_attention(m, "step", 2, 4096, 64, 128, 64, 1),
        linear_attention(m, "step", 1, 4096, 128, 128, 64, 8),
    ]
    attention += [linear_attention(m, x, 8, 2048, 8, 128, 128) for x in ("none", "head")]
    attention += [
        linear_attention(m, "channel", 8, 2048, 4, 128, 256),
        linear_attention(m, "channel", 1, 16384, 4, 256, 512),
    ]
    delta = [delta_rule(m, x, 8, 2048, 8, 128, 128) for x in ("none", "step", "channel")]
    delta += [delta_rule(m, x, 1, 16384, 16, 128, 128) for x in ("none", "step", "channel")]
    return {
        "scan": [scan(m, 8, 2048, 1536), scan(m, 1, 131072, 2048)],
        "selective_scan": [selective_scan(m, b, t, 1536) for b, t in lengths] + [selective_scan(m, 2, 4096, 5120)],
        "linear_attention": attention,
        "delta_rule": delta,
        "short": [short(m, 8, 2048, 1792), short(m, 1, 131072, 1792), short(m, 2, 4096, 4352)],
        "rms_norm": [
            rms_norm(m, 16384, d, gated) for d, gated in ((768, False), (1536, True), (4096, False), (8192, True))
        ],
        "vandermonde": [vandermonde(m, 512, 32, 4096), vandermonde(m, 512, 32, 65536)],
    }


# ---------------------------------------------------------------------------------------------------------- the parts


def first(result: Any) -> list[Tensor]:
    """Return what a call gave as a list of tensors."""
    return [x for x in (result if isinstance(result, tuple | list) else (result,)) if isinstance(x, Tensor)]


def gradients(call: Callable[..., Any], given: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients of all that was given, for those of the first results."""
    results = first(call(**given))[: len(grads)]
    found = torch.autograd.grad(results, list(given.values()), grads, allow_unused=True)
    return [torch.zeros_like(x) if f is None else f for x, f in zip(given.values(), found, strict=True)]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest number of each tensor; not-a-number if there is one."""
    pairs = zip(found, wanted, strict=True)
    errors = [(x.double() - y).abs().max() / y.abs().max().clamp(min=1e-9) for x, y in pairs]
    return float(torch.stack(errors).max().item())  # Python's max would pass over what is not a number


def check(problem: Problem) -> tuple[float, float]:
    """Return the errors of outputs and of gradients against float64."""
    given = {name: x.detach().requires_grad_() for name, x in problem.given.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in problem.given.items()}
    truth = first(problem.call(**exact))
    grads = [torch.randn_like(x).bfloat16() for x in truth]
    wanted = gradients(problem.call, exact, [g.to(x.dtype) for g, x in zip(grads, truth, strict=True)])
    with poisoned():
        found = first(problem.call(**given))
        slopes = gradients(problem.call, given, [g.to(x.dtype) for g, x in zip(grads, found, strict=True)])
    return error(found, truth), error(slopes, wanted)


def kernels(m: Machine, only: list[str], part: str) -> None:
    """Check and time every kernel and its peers."""
    head = ("shape", "", "error", "forward, µs", "of floor", "× ours", "with backward, µs", "of floor", "× ours")
    wrong, found = [], problems(m)
    if unknown := [op for op in only if op not in found]:
        raise ValueError(f"--ops: there is no op {unknown[0]!r}; there are {', '.join(found)}")
    for op, cases in found.items():
        if not only or op in only:
            with rows(op, *head):
                wrong += [f"{op} {case.shape}" for case in cases if part in case.shape and not measured(m, case)]
    if wrong:
        raise ValueError(f"not computed, or too inexactly: {'; '.join(wrong)}")


def measured(m: Machine, case: Problem) -> bool:
    """Print the rows of a problem, ours, then each peer; return whether ours is right."""
    ours, right = [0.0, 0.0], False
    for name, call in {"Longstate": case.call, **{peer: case.peers[peer] for peer in beside(m, *case.peers)}}.items():
        cells = [case.shape, name]
        try:
            if call is case.call:
                errors = check(case)
                right = all(x <= 0.05 for x in errors)  # bfloat16 and long sums: what is wrong errs by its size
                cells.append("{:.1e}, {:.1e}".format(*errors))
            cells += _cells(m, case, call, ours)
        except Exception as failure:  # the rest goes on
            right = right and call is not case.call
            cells += [reason(failure)] + [""] * (8 - len(cells))
        row(*cells)
    return right


def _cells(m: Machine, case: Problem, call: Callable[..., Any], ours: list[float]) -> list[str]:
    """Return a peer's error, times, shares of the floors and ratios of a call; ours writes its times down."""
    given = {name: x.detach().requires_grad_() for name, x in case.given.items()}
    with torch.no_grad():
        outputs = first(case.call(**case.given))
    read, written = nbytes(*case.given.values()), nbytes(*outputs)
    # Backward: inputs and the gradients of outputs are read, those of inputs written.
    floors = [(read + written) / m.copies, (3 * read + 2 * written) / m.copies]
    floors = [max(floors[0], case.products[0] / m.multiplies), max(floors[1], sum(case.products) / m.multiplies)]
    cells = []
    if call is not case.call:
        cells.append(f"{error(first(call(**case.given))[:1], [outputs[0].double()]):.1e}")
    grads = [torch.randn_like(x) for x in first(call(**given))[:1]]

    def forward() -> None:
        with torch.no_grad():
            call(**case.given)

    for i, run in enumerate((forward, lambda: gradients(call, given, grads))):
        took, why = seconds(m, run)
        if call is case.call:
            ours[i] = took
        ratio = f"{took / ours[i]:.2f}" if ours[i] else ""
        cells += [f"{took * 1e6:,.0f}{'*' if why else ''}", f"{floors[i] / took:.0%}", ratio]
    return cells


def model(name: str, size: str, device: torch.device) -> LanguageModel:
    """Return a Mamba or Mamba-2 of random weights in bfloat16, of a published shape."""
    layers, width = {"130M": (24, 768), "1.3B": (48, 2048), "quick": (2, 64)}[size]
    mixer = {"mamba": {"mixer": "mamba"}, "mamba2": {"mixer": "mamba2", "d_state": 128, "head_dim": 64}}[name]
    with device:
        built = LanguageModel(50280, width, [mixer] * layers, pad_vocab_size_multiple=16)
    return built.to(torch.bfloat16)


def in_transformers(name: str, size: str, device: torch.device) -> torch.nn.Module:
    """Return the same model of transformers, with other random weights."""
    import transformers

    layers, width = {"130M": (24, 768), "1.3B": (48, 2048), "quick": (2, 64)}[size]
    shared = dict(vocab_size=50280, hidden_size=width, num_hidden_layers=layers, tie_word_embeddings=True)
    if name == "mamba":
        config, kind = transformers.MambaConfig(**shared, state_size=16), transformers.MambaForCausalLM
    else:
        heads = dict(num_heads=2 * width // 64, head_dim=64, n_groups=1, state_size=128)
        config, kind = transformers.Mamba2Config(**shared, **heads), transformers.Mamba2ForCausalLM
    with device:
        built = kind(config)
    return built.to(torch.bfloat16)


def in_mamba_ssm(name: str, size: str, device: torch.device) -> torch.nn.Module:
    """Return the same model of mamba-ssm, with other random weights."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    layers, width = {"130M": (24, 768), "1.3B": (48, 2048), "quick": (2, 64)}[size]
    kind = {"mamba": "Mamba1", "mamba2": "Mamba2"}[name]
    config = MambaConfig(d_model=width, n_layer=layers, vocab_size=50280, ssm_cfg={"layer": kind})
    return MambaLMHeadModel(config, device=device, dtype=torch.bfloat16)


def products(m: Machine) -> None:
    """Time the products of a captured step's token, with what is in the same kernel, beside the library's product."""
    if m.device.type != "cuda":
        return
    from longstate.ops.linear.triton import Norm, Taps, product

    title = "Products of a token: µs, and how much of the speed of memory that is"
    with rows(title, "weights", "sequences", "floor", "torch", "ours", "with norm and convolution"):
        least, _ = seconds(m, torch.zeros(1, device=m.device).zero_)
        row("none: a kernel that does nothing", "", f"{1e6 * least:,.1f}", "", "", "")
        for inputs, outputs in (768, 3352), (1536, 768), (2048, 8512), (4096, 2048):
            for batch in (1, 4, 8):
                x, weight, gain = (randn(m, *shape) for shape in ((batch, inputs), (outputs, inputs), (inputs,)))
                norm = Norm(gain, None, 1e-5, 1, 0.0, False)
                width = outputs // 2
                taps = Taps(randn(m, width, 4), randn(m, width), randn(m, batch, 3, width), outputs // 4)
                ours = partial(product, x, weight, None, None, torch.bfloat16)
                calls = partial(functional.linear, x, weight), ours, partial(ours, norm=norm, taps=taps)
                floor = nbytes(weight) / m.copies
                times = (f"{1e6 * t:,.1f} ({floor / t:.0%})" for t in (seconds(m, call)[0] for call in calls))
                row(f"{inputs} → {outputs}", batch, f"{1e6 * floor:,.1f}", *times)


_FIRST_CALLS = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import gpu
from longstate import ops
machine = gpu.Machine(torch.device(sys.argv[2]), 1.0, 1.0, 1, True, "none")
torch.zeros(1, device=machine.device) @ torch.zeros(1, 1, device=machine.device)
for name, problems in gpu.problems(machine).items():
    begin = time.perf_counter()
    for problem in problems:
        given = {key: x.detach().requires_grad_() for key, x in problem.given.items()}
        y = gpu.first(problem.call(**given))
        gpu.gradients(problem.call, given, [torch.ones_like(x) for x in y[:1]])
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    print(name, time.perf_counter() - begin)
"""


def start(m: Machine) -> None:
    """Time the first call of every kernel, forward and backward, in a process of its own that has compiled nothing."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", _FIRST_CALLS, str(here), m.device.type],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = [(name, float(took)) for name, took in map(str.split, done.stdout.splitlines())]
    with rows("First calls, forward and backward, with nothing compiled before", "op", "s"):
        for name, took in (*found, ("all", sum(took for _, took in found))):
            row(name, f"{took:.1f}")


def decode(m: Machine) -> None:
    """Time one token of each of a batch of sequences, after a prompt of one token."""
    size = "quick" if m.quick else "1.3B"
    head = ("sequences", "", "µs a step", "of the speed of memory", "tokens/s")
    with torch.no_grad(), rows(f"Decoding, Mamba-2 of {size}", *head):
        ours = model("mamba2", size, m.device).eval()
        for batch in (1, 2) if m.quick else (1, 8, 16, 64, 256):
            try:
                took, floor = _step(m, ours, batch)
            except Exception as failure:
                row(batch, "Longstate", reason(failure), "", "")
                continue
            row(batch, "Longstate", f"{1e6 * took:,.0f}", f"{floor / took:.0%}", f"{batch / took:,.0f}")
        del ours
        for peer in beside(m, "transformers"):
            try:
                theirs = in_transformers("mamba2", size, m.device).eval()
                for batch in (1, 2) if m.quick else (1, 64):
                    took = _step_of_transformers(m, theirs, batch)
                    row(batch, peer, f"{1e6 * took:,.0f}", "", f"{batch / took:,.0f}")
            except Exception as failure:
                row("", peer, reason(failure), "", "")


def _step(m: Machine, ours: LanguageModel, batch: int) -> tuple[float, float]:
    """Return the time of a step, and that of the bytes of its weights and states."""
    token = torch.randint(50280, (batch,), device=m.device)
    step = CapturedStep(ours, batch)
    step(token)
    run = step._graph.replay if step._graph is not None else partial(step, token)
    return statistics.median(tokens(m, run)), (weight_bytes(ours) + 2 * states.nbytes(step._state)) / m.copies


def _step_of_transformers(m: Machine, peer: torch.nn.Module, batch: int) -> float:
    token = torch.randint(50280, (batch, 1), device=m.device)
    cache = peer(token, use_cache=True).cache_params
    options: dict[str, Any] = dict(cache_params=cache, use_cache=True)
    try:
        peer(token, **options)
    except ValueError:  # older releases ask for the place
        options["cache_position"] = torch.ones(1, dtype=torch.int64, device=m.device)
    return statistics.median(tokens(m, partial(peer, token, **options)))


def tokens(m: Machine, run: Callable[[], Any], count: int = 32) -> list[float]:
    """Return the seconds of a step in each of some series of steps."""
    times = []
    for i in range(-1, m.repeats if not m.quick else 1):
        begin = time.perf_counter()
        for _ in range(count if not m.quick else 2):
            run()
        if m.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 0:
            times.append((time.perf_counter() - begin) / (count if not m.quick else 2))
    return times


def train(m: Machine) -> None:
    """Time a training step: forward, backward and AdamW, of 8 sequences of 2,048 tokens."""
    size, shape = ("quick", (2, 32)) if m.quick else ("130M", (8, 2048))
    batch = torch.randint(50280, (shape[0], shape[1] + 1), device=m.device)
    sides = {"Longstate": model, "transformers": in_transformers, "mamba-ssm": in_mamba_ssm}
    names = ["Longstate", *beside(m, "mamba-ssm", "transformers")]
    title = f"A training step, {size}, {shape[0]} × {shape[1]:,} tokens, bfloat16"
    with rows(title, "model", "", "ms", "of 6 · parameters · tokens at the speed of products"):
        for side in names:
            if side == "transformers" and not m.quick and not (find_spec("mamba_ssm") and find_spec("causal_conv1d")):
                row("", side, "left out: without mamba-ssm and causal-conv1d it keeps 80 to 150 GB of activations", "")
                continue
            for name in ("mamba", "mamba2"):
                try:
                    took, parameters = _training_step(m, side, sides[side](name, size, m.device).train(), batch)
                except Exception as failure:
                    row(name, side, reason(failure), "")
                    continue
                work = 6 * parameters * shape[0] * shape[1]
                row(name, side, f"{1e3 * took:.1f}", f"{work / took / m.multiplies:.1%}")


def _training_step(m: Machine, side: str, built: Any, batch: Tensor) -> tuple[float, int]:
    """Return the time of a step and the number of parameters."""
    optimizer = torch.optim.AdamW(built.parameters(), 1e-4, fused=m.device.type == "cuda")

    def step() -> None:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        given = dict(use_cache=False) if side == "transformers" else {}
        logits = built(inputs)[0] if side == "Longstate" else built(inputs, **given).logits
        functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return statistics.median(tokens(m, step, 4)), sum(p.numel() for p in built.parameters())


def attention(m: Machine) -> None:
    """Time linear attention as Mamba-2 has it beside causal softmax attention of the same width, forward."""
    with rows(
        "Linear and softmax attention, 24 heads of 64 values, forward", "steps", "linear, µs", "softmax, µs", "ratio"
    ):
        for length in (32, 64) if m.quick else (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
            case = linear_attention(m, "step", 1, length, 24, 128, 64, 1)
            qkv = [randn(m, 1, 24, length, 64) for _ in range(3)]
            softmax = partial(functional.scaled_dot_product_attention, *qkv, is_causal=True)
            with torch.no_grad():
                linear, _ = seconds(m, partial(case.call, **case.given))
                quadratic, _ = seconds(m, softmax)
            row(f"{length:,}", f"{1e6 * linear:,.0f}", f"{1e6 * quadratic:,.0f}", f"{quadratic / linear:.2f}")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, with commas between them; all if left out")
    parser.add_argument("--ops", default="", help="ops, with commas between them; all if left out")
    parser.add_argument("--shapes", default="", help="a part of the names of the shapes to take")
    parser.add_argument(
        "--peers", default="", help="peers, with commas between them; all that are installed if left out"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.quick:
        sys.exit("There is no GPU. --quick shows on a CPU that the script runs, with the kernels for CPUs.")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{name}; torch {torch.__version__}; " + ", ".join(f"{x} {installed(x)}" for x in PEERS))
    machine = ceilings(device, arguments.repeats, arguments.quick, arguments.peers)
    print(
        f"copy {machine.copies / 1e12:.2f} TB/s, bfloat16 product {machine.multiplies / 1e12:.0f} TFLOP/s.\n",
        flush=True,
    )
    torch.manual_seed(int(time.time()))  # fresh numbers every time
    parts = {
        "start": partial(start, machine),
        "products": partial(products, machine),
        "kernels": partial(kernels, machine, [x for x in arguments.ops.split(",") if x], arguments.shapes),
        "decode": partial(decode, machine),
        "train": partial(train, machine),
        "attention": partial(attention, machine),
    }
    asked = arguments.only.split(",") if arguments.only else list(parts)
    if unknown := [part for part in asked if part not in parts]:
        parser.error(f"--only: there is no part {unknown[0]!r}; there are {', '.join(parts)}")
    failed = []
    for part in asked:
        try:
            parts[part]()
        except Exception:  # the rest goes on
            traceback.print_exc()
            failed.append(part)
    if failed:
        sys.exit(f"These parts failed: {', '.join(failed)}.")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
