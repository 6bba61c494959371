"""How exact kernels are, ours and by the formulas of textbooks, against 50 digits; prints Markdown.

    python benchmarks/kernel_accuracy.py [--length 16384] [--state 64]

The kernel of a layer is its linear part after an impulse, K_l for l < length, of two channels: one with Δ = 0.001,
one with Δ = 0.1 (S5 and LRU have a single system, which they draw themselves). The truth comes from the parameters as
they are stored, in the type that they are stored in, by mpmath; so the errors have all that happens between parameters
and outputs. A table shows the largest error of a tap, relative to the largest tap, at 512 taps: the first 128, and
others spread over all scales up to the last. Needs mpmath.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable

import mpmath
import numpy as np
import torch
from measure import table
from torch import Tensor

import longstate
from longstate import DSS, LRU, S4, S4D, S5, LinOSS, Mixer, Timeline, native, ops
from longstate.mixers._diagonal import log_bilinear

DIGITS = 50
BITS = 256  # behind the point of a number in fixed point
APART = (S4, S4D, DSS)  # a system for each channel
Modes = list[tuple[list[mpmath.mpc], list[mpmath.mpc]]]  # of each kernel: log Ā, and what multiplies its powers


def exact_number(x: Tensor) -> np.ndarray:
    """Return numbers as mpmath has them, without rounding."""
    wide = x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
    return np.vectorize(
        lambda value: mpmath.mpmathify(complex(value) if wide.is_complex() else float(value)), otypes=[object]
    )(wide.numpy())


def exact_s4d(layer: S4D) -> Modes:
    """Return modes of an S4D: real parts by e^w, zero-order hold or the bilinear rule."""
    exp = np.vectorize(mpmath.exp, otypes=[object])
    A, B, C, dt = (
        exact_number(layer.A_real),
        exact_number(layer.B),
        exact_number(layer.C),
        exp(exact_number(layer.log_dt)),
    )
    A = -exp(A)
    if layer.A_imag is not None:
        A = A + 1j * exact_number(layer.A_imag)
        B, C = (x[..., 0] + 1j * x[..., 1] for x in (B, C))
    z = A * dt[:, None]
    if layer.discretization == "bilinear":
        log_decay, gain = (
            np.vectorize(mpmath.log, otypes=[object])((1 + z / 2) / (1 - z / 2)),
            dt[:, None] / (1 - z / 2),
        )
    else:
        log_decay, gain = z, np.vectorize(mpmath.expm1, otypes=[object])(z) / A
    scale = 1 if layer.A_imag is None else 2
    return [(list(a), list(w)) for a, w in zip(log_decay, scale * C * B * gain, strict=True)]


def exact_dss(layer: DSS) -> Modes:
    """Return modes of a DSS of exponential kernels."""
    exp = np.vectorize(mpmath.exp, otypes=[object])
    real, imag, dt = -exp(exact_number(layer.A_real)), exact_number(layer.A_imag), exp(exact_number(layer.log_dt))
    z, W = dt[:, :1] * real + 1j * dt[:, 1:] * imag, exact_number(layer.W)
    weights = (W[..., 0] + 1j * W[..., 1]) * np.vectorize(mpmath.expm1, otypes=[object])(z) / (real + 1j * imag)
    return [(list(a), list(w)) for a, w in zip(z, weights, strict=True)]


def exact_linoss(layer: LinOSS) -> Modes:
    """Return modes of a LinOSS by its implicit rule: of M = S [[1, −ΔA], [Δ, 1]] the eigenvalue S (1 + iΔ√A)."""
    root = np.vectorize(mpmath.sqrt, otypes=[object])
    A, dt = exact_number(layer.A), np.vectorize(mpmath.exp, otypes=[object])(exact_number(layer.log_dt))
    shrink = 1 / (1 + dt * dt * A)
    turn, force = shrink * (1 + 1j * dt * root(A)), dt * shrink
    B, C = (x[..., 0] + 1j * x[..., 1] for x in (exact_number(layer.B), exact_number(layer.C)))
    # An impulse is force (1, Δ): half of it on this eigenvector (i√A, 1), half on its conjugate.
    part, log_decay = dt * force - 1j * force / root(A), np.vectorize(mpmath.log, otypes=[object])(turn)
    real = np.vectorize(mpmath.re, otypes=[object])
    return [(list(log_decay), list(real(C[i] * B[:, 0]) * part)) for i in (0, -1)]


def exact_s4(layer: S4, taps: list[int]) -> np.ndarray:
    """Return taps of an S4 of rank 1, step by step in fixed point, each step by Sherman and Morrison's identity."""
    one, rows, wanted = 1 << BITS, [], set(taps)
    fixed = np.vectorize(lambda x: int(mpmath.nint(x * one)), otypes=[object])
    exp = np.vectorize(mpmath.exp, otypes=[object])
    for c in range(layer.d_model):
        real, imag, dt = (
            -exp(exact_number(layer.log_A_real[c])),
            exact_number(layer.A_imag[c]),
            mpmath.exp(layer.log_dt[c].item()),
        )
        P, B, C = (
            x[..., 0] + 1j * x[..., 1] for x in (exact_number(v[c]) for v in (layer.P[:, :, 0], layer.B, layer.C))
        )
        half = dt * (real + 1j * imag) / 2
        E, parts = 1 / (1 - half), np.vectorize(lambda x: (x.real, x.imag), otypes=[object, object])
        damped = dt / (1 + dt * sum(mpmath.re(x) for x in np.conj(P) * E * P))
        numbers = [((1 + half) * E), dt * E * P, np.conj(P), damped * E * P, np.conj(P), dt * E * B, C]
        (turn, push, read, pull, sense, drive, show) = (tuple(map(fixed, parts(x))) for x in numbers)
        x, found = drive, []
        for tap in range(taps[-1] + 1):
            if tap:
                level = (read[0] @ x[0] - read[1] @ x[1]) >> BITS
                r = (
                    ((turn[0] * x[0] - turn[1] * x[1] - push[0] * level) >> BITS),
                    ((turn[0] * x[1] + turn[1] * x[0] - push[1] * level) >> BITS),
                )
            else:
                r = drive
            level = (sense[0] @ r[0] - sense[1] @ r[1]) >> BITS
            x = (r[0] - ((pull[0] * level) >> BITS), r[1] - ((pull[1] * level) >> BITS))
            if tap in wanted:
                found.append(mpmath.mpf(2 * ((show[0] @ x[0] - show[1] @ x[1]) >> BITS)) / one)
        rows.append(found)
    return np.array(rows, dtype=object)


def exact_modes(layer: Mixer) -> Modes:
    """Return modes of a layer; where channels mix, those from the first input to the first and last output."""
    if isinstance(layer, S4D):
        return exact_s4d(layer)
    if isinstance(layer, DSS):
        return exact_dss(layer)
    if isinstance(layer, LinOSS):
        return exact_linoss(layer)
    exp = np.vectorize(mpmath.exp, otypes=[object])
    B, C = (x[..., 0] + 1j * x[..., 1] for x in (exact_number(layer.B), exact_number(layer.C)))
    if isinstance(layer, S5):
        A = -exp(exact_number(layer.A_real)) + 1j * exact_number(layer.A_imag)
        log_decay = A * exp(exact_number(layer.log_dt))
        gain, scale = np.vectorize(mpmath.expm1, otypes=[object])(log_decay) / A, 2
    else:
        log_decay = -exp(exact_number(layer.nu_log)) + 1j * exp(exact_number(layer.theta_log))
        gain, scale = exp(exact_number(layer.gamma_log)), 1
    return [(list(log_decay), list(scale * C[i] * gain * B[:, 0])) for i in (0, -1)]


def exact(modes: Modes, taps: list[int]) -> np.ndarray:
    """Return taps ``[kernels taps]`` with all their digits."""
    rows = []
    for log_decay, weights in modes:
        powers = ([mpmath.exp(tap * z) for z in log_decay] for tap in taps)
        rows.append([mpmath.fsum(mpmath.re(w * p) for w, p in zip(weights, power, strict=True)) for power in powers])
    return np.array(rows, dtype=object)


@torch.no_grad()
def ours(layer: Mixer, length: int, scanned: bool) -> Tensor:
    """Return kernels ``[kernels l]``: what the layer does after an impulse, convolved or scanned."""
    x = torch.zeros(1, length, layer.d_model, dtype=layer.D.dtype)
    x[:, 0] = 1
    if not isinstance(layer, APART):
        x[:, 0, 1:] = 0
    timeline = Timeline(valid=torch.ones(1, length, dtype=torch.bool)) if scanned else None
    y = layer(x, None, timeline)[0][0].mT
    return y if isinstance(layer, APART) else y[[0, -1]]


def coefficients(layer: Mixer, subtract: bool = False, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return log Ā and the weights of its powers ``[kernels n]``, computed in a type, the layer's own when absent.

    With ``subtract``, (e^z − 1)/z is written so.
    """
    dtype = layer.D.dtype if dtype is None else dtype
    if isinstance(layer, DSS):
        dt, real = layer.log_dt.to(dtype).exp(), -layer.A_real.to(dtype).exp()
        A, z = (
            torch.complex(real, layer.A_imag.to(dtype)),
            torch.complex(dt[:, :1] * real, dt[:, 1:] * layer.A_imag.to(dtype)),
        )
        gain = (torch.exp(z) - 1 if subtract else torch.expm1(z)) / A
        return z, torch.view_as_complex(layer.W.to(dtype)) * gain / 2
    if isinstance(layer, S4D):
        A, B, C, dt = layer.system() if dtype == layer.D.dtype else copy.deepcopy(layer).to(dtype).system()
        dt = dt[:, None]
    else:
        B, C = (torch.view_as_complex(x.to(dtype)) for x in (layer.B, layer.C))
        B, C = B[:, 0], C[[0, -1]]
    if isinstance(layer, LRU):
        z = torch.complex(-layer.nu_log.to(dtype).exp(), layer.theta_log.to(dtype).exp())
        return z.expand_as(C), C * layer.gamma_log.to(dtype).exp() * B / 2
    if isinstance(layer, S5):
        A, dt = torch.complex(-layer.A_real.to(dtype).exp(), layer.A_imag.to(dtype)), layer.log_dt.to(dtype).exp()
    z = dt * A
    if layer.discretization == "bilinear":
        return torch.log((1 + z / 2) / (1 - z / 2)), C * B * (dt / (1 - z / 2))
    gain = dt * ((torch.exp(z) - 1) / z) if subtract else torch.expm1(z) / A
    return z.expand_as(C), C * B * gain


@torch.no_grad()
def textbook(layer: Mixer, length: int, powers: str, subtract: bool = False) -> Tensor:
    """Return kernels by a formula in the layer's own precision, its powers all written out."""
    z, weights = coefficients(layer, subtract)
    count = torch.arange(length, dtype=layer.D.dtype)
    if powers == "product":
        base = z.exp()[..., None].expand(*z.shape, length - 1)
        found = torch.cat([torch.ones_like(z)[..., None], base], -1).cumprod(-1)
    else:
        found = z.exp()[..., None] ** count if powers == "power" else torch.exp(z[..., None] * count)
    taps = (weights[..., None] * found).sum(1)
    return 2 * taps.real if taps.is_complex() else taps


@torch.no_grad()
def by_op(layer: Mixer, length: int, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return kernels by ``ops.vandermonde`` alone, in the layer's precision."""
    z, weights = coefficients(layer, dtype=dtype)
    if getattr(layer, "discretization", "") == "bilinear":  # as the layer takes the logarithm
        A, _, _, dt = layer.system() if dtype is None else copy.deepcopy(layer).to(dtype).system()
        z = log_bilinear((dt[:, None] * A).to(torch.complex128))
    weights = weights.to(weights.dtype if dtype is None else torch.promote_types(layer.D.dtype, torch.complex32))
    return ops.vandermonde(weights if z.is_complex() else weights.real.to(layer.D.dtype), z, length, backend=backend)


WAYS: dict[str, Callable[[Mixer, int], Tensor]] = {
    "layer, convolved": lambda layer, length: ours(layer, length, False),
    "layer, scanned": lambda layer, length: ours(layer, length, True),
    "`ops.vandermonde`, compiled": lambda layer, length: by_op(layer, length, "cpu"),
    "`ops.vandermonde`, chunked": lambda layer, length: by_op(layer, length, "chunked"),
    "the same, A and Δ in float64": lambda layer, length: by_op(layer, length, "chunked", torch.float64),
    "e^{lz}": lambda layer, length: textbook(layer, length, "exponential"),
    "e^{lz}, with (e^z − 1)/z": lambda layer, length: textbook(layer, length, "exponential", True),
    "(e^z) ** l": lambda layer, length: textbook(layer, length, "power"),
    "e^z · e^z · e^z · …": lambda layer, length: textbook(layer, length, "product"),
}


def missing(name: str, layer: Mixer) -> bool:
    """Return whether a layer has no such way."""
    if name == "layer, convolved":
        return not isinstance(layer, APART)
    if isinstance(layer, S4 | LinOSS):
        return name != "layer, scanned"
    return native.kernels is None and "compiled" in name


def layers(state: int, dtype: torch.dtype) -> dict[str, Mixer]:
    """Return the layers, without skip and what follows the recurrence."""
    torch.manual_seed(0)
    found: dict[str, Mixer] = {
        f"S4D {name} {rule}": S4D(2, state, name, rule, output="identity")
        for name, rule in [(x, "zoh") for x in ("legs", "lin", "inv", "quad", "real")] + [("lin", "bilinear")]
    }
    found |= {"S4": S4(2, state, output="identity"), "DSS": DSS(2, state // 2, output="identity")}
    found |= {"LinOSS": LinOSS(2, state // 2, output="identity")}
    found |= {"S5": S5(2, state, output="identity"), "LRU": LRU(2, state, output="identity")}
    for layer in found.values():
        layer.D.data.zero_()
        if isinstance(layer, APART):
            layer.log_dt.data = (
                torch.log(torch.tensor([1e-3, 1e-1]))
                .reshape(2, *[1] * (layer.log_dt.ndim - 1))
                .expand_as(layer.log_dt)
                .clone()
            )
    return {name: layer.to(dtype) for name, layer in found.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--state", type=int, default=64)
    arguments = parser.parse_args()
    length = arguments.length
    spread = np.geomspace(128, length - 1, 384).round().astype(int) if length > 128 else []
    taps = sorted({*range(min(length, 128)), *map(int, spread)})
    mpmath.mp.dps = DIGITS
    kernels = f"compiled kernels for {native.instructions()}" if native.kernels else f"no kernels: {native.reason}"
    print(f"{platform.machine()}, {kernels}; torch {torch.__version__}, longstate {longstate.__version__};")
    print(f"d_state {arguments.state}, {length} taps, largest error of a tap relative to the largest tap\n")
    for dtype in (torch.float32, torch.float64):
        made = layers(arguments.state, dtype)
        rows: dict[str, list[str]] = {name: [] for name in WAYS}
        for layer in made.values():
            wanted = exact_s4(layer, taps) if isinstance(layer, S4) else exact(exact_modes(layer), taps)
            for name, way in WAYS.items():
                if missing(name, layer):
                    rows[name].append("")
                    continue
                got = way(layer, length)[:, taps].numpy().astype(np.float64)
                errors = [
                    max(abs(mpmath.mpf(float(a)) - b) for a, b in zip(*pair, strict=True))
                    for pair in zip(got, wanted, strict=True)
                ]
                worst = max(error / max(abs(x) for x in row) for error, row in zip(errors, wanted, strict=True))
                rows[name].append(f"{float(worst):.1e}")
        print(f"### {str(dtype).removeprefix('torch.')}\n")
        table(["", *made], *([name, *row] for name, row in rows.items()))


if __name__ == "__main__":
    main()
