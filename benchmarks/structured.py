"""Time and memory of the time-invariant mixers, against the plainest correct form of each; prints Markdown.

    python benchmarks/structured.py [--only s4d,s5] [--lengths 1024,4096,16384,65536] [--threads 2] [--repeats 5]

Peer, if it is installed: pip install s5-pytorch. Every mixer has 64 channels, one sequence, float32, and its options
as they are when not given, but for a chunk of 128 in the attention of Mega and Megalodon. The plain form of a kernel
is written out, all powers of all modes (``[d n l]``), and convolved by a transform of twice the length; that of a
recurrence is a scan by doubling in torch. Both sides have the same weights and, where outputs differ by more than
rounding, the run ends. Forward is without gradients; training is forward and backward to inputs and parameters. What
is compared is timed in turn, round by round, after a round that does not count; tables show medians (least–most), and
ratios are medians of the ratios within each round. Memory is what training adds to the peak of a process of its own.
A mixer that is new in the registry is measured by itself until it has a line in PLAIN.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from measure import difference, peak, ratio, rounds, spread, table
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from longstate import Mixer, native
from longstate.mixers import DSS, H3, LRU, MIXERS, S4D, S5, TNN, Hyena, LinOSS, LongConv, Mega, Megalodon, SGConv
from longstate.mixers._modes import real_part
from longstate.timeline import Timeline

WIDTH = 64
# What depends on the input, and attention: measured elsewhere.
TIME_VARYING = {"attention", "ltc", "mamba", "mamba2", "rglru", "short_conv"}
OPTIONS = {"mega": {"chunk": 128}, "megalodon": {"chunk": 128}, "long_conv": {"kernel_dropout": 0.0}}
Forward = Callable[[Tensor], Tensor]


def written_out(z: Tensor, weights: Tensor, length: int) -> Tensor:
    """Return kernels ``[d l]`` with every power of every mode in memory at once."""
    taps = (weights[..., None] * torch.exp(z[..., None] * torch.arange(length, dtype=weights.real.dtype))).sum(-2)
    return 2 * taps.real if taps.is_complex() else taps


def convolved(u: Tensor, kernel: Tensor) -> Tensor:
    """Return the causal convolution ``[b t d]`` by one transform."""
    size = u.shape[1] + kernel.shape[1]
    return torch.fft.irfft(torch.fft.rfft(u.mT, size) * torch.fft.rfft(kernel, size), size).mT[:, : u.shape[1]]


def doubled(decay: Tensor, b: Tensor) -> Tensor:
    """Return h_t = decay h_{t−1} + b_t by log₂ t steps over the whole sequence."""
    shift = 1
    while shift < b.shape[1]:
        b = torch.cat([b[:, :shift], b[:, shift:] + decay * b[:, :-shift]], 1)
        decay, shift = decay * decay, 2 * shift
    return b


def short(layer: nn.Module, u: Tensor) -> Tensor:
    """Return the short convolution of a layer, without activation."""
    taps = layer.weight.shape[-1]
    return functional.conv1d(functional.pad(u.mT, (taps - 1, 0)), layer.weight, layer.bias, groups=u.shape[-1]).mT


def plain_s4d(layer: S4D, x: Tensor) -> Tensor:
    A, B, C, dt = layer.system()
    z = dt[:, None] * A
    return layer.output(convolved(x, written_out(z, C * B * torch.expm1(z) / A, x.shape[1])) + layer.D * x)


def plain_s5(layer: S5, x: Tensor) -> Tensor:
    A = torch.complex(real_part(layer.A_real, layer.parameterization), layer.A_imag)
    z = layer.log_dt.exp() * A
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    h = doubled(z.exp(), x.to(B.dtype) @ (torch.expm1(z) / A * B.mT))
    return layer.output(2 * (h @ C.mT).real + layer.D * x)


def plain_lru(layer: LRU, x: Tensor) -> Tensor:
    decay = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()))
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    h = doubled(decay, x.to(B.dtype) @ (layer.gamma_log.exp() * B.mT))
    return layer.output((h @ C.mT).real + layer.D * x)


def plain_dss(layer: DSS, x: Tensor) -> Tensor:
    eigenvalues, z = layer.modes()
    weights = torch.view_as_complex(layer.W) * (torch.expm1(z) / eigenvalues).to(torch.complex64) / 2
    kernel = written_out(z.to(torch.complex64), weights, x.shape[1])
    return layer.output(convolved(x, kernel) + layer.D * x)


def plain_linoss(layer: LinOSS, x: Tensor) -> Tensor:
    M, gain = layer._step(layer.log_dt.exp())
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    h, shift = gain * (x.to(B.dtype) @ B.mT)[..., None], 1
    M = M.to(B.dtype)
    while shift < x.shape[1]:
        earlier = (M @ h[:, :-shift, :, :, None])[..., 0]
        h, M, shift = torch.cat([h[:, :shift], h[:, shift:] + earlier], 1), M @ M, 2 * shift
    return layer.output((h[..., 1] @ C.mT).real + layer.D * x)


def plain_h3(layer: H3, x: Tensor) -> Tensor:
    q, k, v = layer.q_proj(x), short(layer.conv1d, layer.k_proj(x)), layer.v_proj(x)
    log_decay, B, C = layer.system()
    read = convolved(k * v, written_out(log_decay.to(C.dtype), C * B, x.shape[1]))
    return layer.o_proj(q * (read + layer.D * k * v))


class PlainAverage(nn.Module):
    """The moving average of Mega or Megalodon, its kernel written out."""

    def __init__(self, average: nn.Module) -> None:
        super().__init__()
        self.average = average

    def forward(self, x: Tensor, state: None, timeline: Timeline) -> tuple[Tensor, None]:
        p = self.average
        n, rate = p.alpha.shape[1], p.alpha.sigmoid()
        z, scale = torch.log1p(-rate * p.delta.sigmoid()), 1 / math.sqrt(n)
        if hasattr(p, "beta"):
            weights = p.eta * rate * p.beta * scale
        else:
            turn = torch.arange(1, n + 1) * (2 * math.pi / n)
            z = torch.complex(z, p.theta.sigmoid()[:, None] * turn)
            weights = torch.view_as_complex(p.eta) * rate * scale / 2
        return convolved(x, written_out(z, weights, x.shape[1])) + p.omega * x, None


def plain_mega(layer: Mega | Megalodon, x: Tensor) -> Tensor:
    other = copy.copy(layer)
    name = "ema" if isinstance(layer, Mega) else "cema"
    other._modules = {**layer._modules, name: PlainAverage(getattr(layer, name))}
    return other(x)[0]


def plain_taps(layer: LongConv | SGConv, x: Tensor) -> Tensor:
    return layer.output(convolved(x, layer.kernel()) + layer.D * x)


def plain_hyena(layer: Hyena, x: Tensor) -> Tensor:
    z, *gates = short(layer.conv1d, layer.in_proj(x)).chunk(layer.order + 1, -1)
    for gate, kernel, skip in zip(gates, layer.filter(x.shape[1]).chunk(layer.order), layer.D, strict=True):
        z = gate * (convolved(z, kernel) + skip * z)
    return layer.out_proj(z)


def plain_tnn(layer: TNN, x: Tensor) -> Tensor:
    kernel = layer.taps(x.shape[1]) * layer.decay ** torch.arange(x.shape[1])
    return layer.o_proj(silu(layer.u_proj(x)) * convolved(silu(layer.v_proj(x)), kernel))


PLAIN: dict[str, Callable[..., Tensor]] = {
    "s4d": plain_s4d,
    "s5": plain_s5,
    "lru": plain_lru,
    "dss": plain_dss,
    "linoss": plain_linoss,
    "h3": plain_h3,
    "mega": plain_mega,
    "megalodon": plain_mega,
    "long_conv": plain_taps,
    "sg_conv": plain_taps,
    "hyena": plain_hyena,
    "tnn": plain_tnn,
}


def s5_pytorch(layer: S5) -> tuple[nn.Module, Forward]:
    """Return the S5 of s5-pytorch with the weights of ours, one sequence at a time, and what follows it in ours."""
    from s5.s5_model import S5 as Peer

    other = Peer(WIDTH, len(layer.log_dt)).seq
    A = torch.complex(real_part(layer.A_real, layer.parameterization), layer.A_imag)
    other.Lambda.data, other.log_step.data = A.detach(), layer.log_dt.detach().clone()
    # Its states are all that there are, ours one of each conjugate pair.
    other.B.data, other.C.data = layer.B.detach().clone(), 2 * torch.view_as_complex(layer.C.detach())
    other.D.data = layer.D.detach().clone()
    return other, lambda x: layer.output(other(x[0])[None])


def sides(name: str) -> tuple[Mixer, dict[str, tuple[list[nn.Parameter], Forward]]]:
    """Return a mixer, and what is measured, with the parameters that each takes gradients of."""
    torch.manual_seed(0)
    layer = MIXERS[name](WIDTH, **OPTIONS.get(name, {}))
    own = list(layer.parameters())
    found: dict[str, tuple[list[nn.Parameter], Forward]] = {"Longstate": (own, lambda x: layer(x)[0])}
    if name in PLAIN:
        found["plain"] = (own, partial(PLAIN[name], layer))
    if name == "s5" and find_spec("s5") is not None:
        other, forward = s5_pytorch(layer)
        found["s5-pytorch"] = ([*other.parameters(), *layer.output.parameters()], forward)
    return layer, found


def training(forward: Forward, parameters: list[nn.Parameter], x: Tensor) -> None:
    """Take the gradients of inputs and parameters."""
    x = x.clone().requires_grad_()
    y = forward(x)
    torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)


def inputs(length: int) -> Tensor:
    """Return the same inputs every time."""
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1))


def added_memory(name: str, side: str, length: int) -> int:
    """Return the bytes that a training step adds to the peak of this process, after a short one."""
    parameters, forward = sides(name)[1][side]
    training(forward, parameters, inputs(128))
    before = peak()
    training(forward, parameters, inputs(length))
    return peak() - before


def memory_of(name: str, side: str, length: int, threads: int) -> str:
    """Return the same in MiB, measured in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory", name, side, str(length)]
    # Large blocks go back to the system at once, so that the peak is what was in use together.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**22)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return f"{json.loads(done.stdout) / 2**20:.0f}" if done.returncode == 0 else "failed"


def measure(name: str, lengths: list[int], repeats: int, threads: int) -> None:
    """Print the table of a mixer."""
    layer, found = sides(name)
    x = inputs(lengths[0])
    with torch.no_grad():
        ours = found["Longstate"][1](x)
        for _, forward in found.values():
            difference(forward(x), ours, "float32")
    parameters = sum(p.numel() for p in layer.parameters())
    print(f"### {type(layer).__name__}, {parameters:,} parameters\n", flush=True)
    rows = []
    for length in lengths:
        x = inputs(length)
        with torch.no_grad():
            forward_times = rounds({side: partial(_drop, f, x) for side, (_, f) in found.items()}, repeats)
        step_times = rounds({side: partial(training, f, p, x) for side, (p, f) in found.items()}, repeats)
        for side in found:
            cells = [length, side]
            for times in (forward_times, step_times):
                slower = f"{ratio(times[side], times['Longstate']):.2f} ×" if side != "Longstate" else ""
                cells += [spread(1e3 * t for t in times[side]), slower]
            rows.append([*cells, memory_of(name, side, length, threads)])
    table(("steps", "", "forward, ms", "of ours", "training, ms", "of ours", "memory, MiB"), *rows)


def _drop(forward: Forward, x: Tensor) -> None:
    forward(x)


def main() -> None:
    """Measure the mixers that are asked for."""
    known = [name for name in MIXERS if name not in TIME_VARYING]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(known), help="mixers, with commas between them")
    parser.add_argument("--lengths", default="1024,4096,16384,65536")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        name, side, length = arguments.memory
        print(added_memory(name, side, int(length)))
        return
    if unknown := [x for x in arguments.only.split(",") if x not in known]:
        parser.error(f"--only: no time-invariant mixer {unknown[0]!r}; there are {', '.join(known)}")
    kernels = f"compiled kernels for {native.instructions()}" if native.kernels else f"no kernels: {native.reason}"
    print(f"{platform.machine()}, {arguments.threads} threads, {kernels}; torch {torch.__version__};")
    print(f"{WIDTH} channels, one sequence, float32. {arguments.repeats} rounds.\n", flush=True)
    for name in arguments.only.split(","):
        measure(name, [int(x) for x in arguments.lengths.split(",")], arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
