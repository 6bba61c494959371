"""What a linear system does: responses to waves, impulses and steps, its poles, and how far it is from instability."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._shapes import Float, Inexact
from .discretization import matrix_exponential
from .state_space import StateSpace, resolvent

AXIS_TOLERANCE = 1e-6  # how far from the axis or circle, relative to its size, a computed crossing may lie


def transfer_function(system: StateSpace, s: Inexact[np.ndarray, " l"]) -> Inexact[np.ndarray, "l outputs inputs"]:
    """Return C (s I − A)⁻¹ B + D at any points that are not poles."""
    return np.moveaxis(np.tensordot(system.C, resolvent(system.A, system.B, s), 1), -1, 0) + system.feedthrough


def frequency_response(
    system: StateSpace, frequencies: Float[np.ndarray, " l"]
) -> Inexact[np.ndarray, "l outputs inputs"]:
    """Return the transfer function at s = iω, or z = e^{iωΔ} of a discrete system.

    Args:
        system: The system.
        frequencies: ω in radians in the unit of time of the system (of Δ).
    """
    s = 1j * frequencies
    return transfer_function(system, s if system.dt is None else np.exp(s * system.dt))


def impulse_response(
    system: StateSpace, times: Float[np.ndarray, " l"] | int
) -> Inexact[np.ndarray, "l outputs inputs"]:
    """Return C e^{At} B at times (without the impulse D itself); of a discrete system D, C B, C A B, ….

    Args:
        system: The system.
        times: Times from 0 on; of a discrete system how many taps.

    Raises:
        ValueError: If times were given for a discrete system, or a number of taps for a continuous one.
    """
    _check_times("impulse_response", system, times)
    if isinstance(times, np.ndarray):
        return np.asarray(system.C @ matrix_exponential(times[:, None, None] * system.A) @ system.B)
    taps, x = [system.feedthrough], system.B
    for _ in range(times - 1):
        taps.append(system.C @ x)
        x = system.A @ x
    return np.stack(taps[:times])


def step_response(system: StateSpace, times: Float[np.ndarray, " l"] | int) -> Inexact[np.ndarray, "l outputs inputs"]:
    """Return the outputs for inputs that are 1 from time 0 on; of a discrete system the sums of its taps.

    Args:
        system: The system.
        times: Times from 0 on; of a discrete system how many steps.

    Raises:
        ValueError: If times were given for a discrete system, or a number of steps for a continuous one.
    """
    _check_times("step_response", system, times)
    if not isinstance(times, np.ndarray):
        return np.cumsum(impulse_response(system, times), axis=0)
    n, inputs = system.B.shape
    block = np.zeros((n + inputs, n + inputs), dtype=np.result_type(system.A, system.B))
    block[:n, :n], block[:n, n:] = system.A, system.B
    held = matrix_exponential(times[:, None, None] * block)[:, :n, n:]  # ∫₀ᵗ e^{As} ds B
    return np.asarray(system.C @ held + system.feedthrough)


def poles(system: StateSpace) -> Inexact[np.ndarray, " n"]:
    """Return the eigenvalues of A."""
    return np.asarray(np.linalg.eigvals(system.A), dtype=np.complex128)


def stability_margin(system: StateSpace) -> float:
    """Return how far the poles are inside: −max Re λ, or 1 − max |λ| of a discrete system; negative when unstable."""
    found = poles(system)
    if not len(found):
        return np.inf
    return float(-found.real.max() if system.dt is None else 1 - np.abs(found).max())


class Margins(NamedTuple):
    """How much a loop L may change before its feedback −1 makes it unstable.

    Attributes:
        gain: The factor nearest to 1 that brings L(iω) to −1; infinite when there is none.
        phase: The angle nearest to 0, in radians, that brings L(iω) to −1; infinite when there is none.
        gain_frequency: ω where L crosses the negative axis so; NaN when nowhere.
        phase_frequency: ω where |L| = 1 so; NaN when nowhere.
    """

    gain: float
    phase: float
    gain_frequency: float
    phase_frequency: float


def margins(loop: StateSpace) -> Margins:
    """Return gain and phase margins of a loop with one input and one output.

    The crossings are not searched for on a grid but are zeros of two systems: of L(s) − L(−s), where L is real, and of
    1 − L(s) L(−s), where |L| = 1 (with 1/z for −s when discrete), found as generalised eigenvalues.

    Raises:
        ValueError: If there are several inputs or outputs, or the system is complex.
    """
    if loop.feedthrough.shape != (1, 1) or any(np.iscomplexobj(x) for x in (loop.A, loop.B, loop.C, loop.D)):
        raise ValueError(
            f"margins: wanted a real loop of one input and one output, not {list(loop.feedthrough.shape)}. Close the"
            " other loops first, or take one entry of B and C."
        )
    real, unit = (_crossings(loop, product) for product in (False, True))
    values = frequency_response(loop, real)[:, 0, 0]
    crossing = (values.real < 0) & (np.abs(values) > 1e-12)
    gains, real = 1 / np.abs(values[crossing]), real[crossing]
    angles = np.angle(-frequency_response(loop, unit)[:, 0, 0])
    g = int(np.argmin(np.abs(np.log(gains)))) if len(gains) else None
    p = int(np.argmin(np.abs(angles))) if len(angles) else None
    return Margins(
        np.inf if g is None else float(gains[g]),
        np.inf if p is None else float(angles[p]),
        np.nan if g is None else float(real[g]),
        np.nan if p is None else float(unit[p]),
    )


def _crossings(loop: StateSpace, product: bool) -> Float[np.ndarray, " l"]:
    """Return frequencies ω ≥ 0 where L(s) − L(s′) or 1 − L(s) L(s′) vanishes, s′ the mirrored point of s."""
    from scipy.linalg import eigvals  # here: SciPy is large, and a model needs none of it

    A, B, C, D = loop.A, loop.B, loop.C, loop.feedthrough
    identity, zero = np.eye(len(A)), np.zeros_like(A)
    # Unknown (x, w, u): x of L at s, w of L at s′, u the input. Rows: s x = A x + B u; the same of w at s′ = −s, or at
    # s′ = 1/s with rows multiplied by s; and the output. With a product the input of the first is the output of L(s′).
    first = [A, B @ C, B @ D] if product else [A, zero, B]
    last = [-C, -D @ C, 1 - D @ D] if product else [C, -C, 0 * D]
    if loop.dt is None:
        second, moved = [zero, A, B], [zero, -identity, 0 * B]
    else:
        second, moved = [zero, identity, 0 * B], [zero, A, B]
    M = np.block([first, second, last])
    E = np.block([[identity, zero, 0 * B], moved, [0 * C, 0 * C, 0 * D]])
    pairs = eigvals(M, E, homogeneous_eigvals=True)
    finite = np.abs(pairs[1]) > 1e-12 * np.abs(pairs[0])
    s = pairs[0, finite] / pairs[1, finite]
    if loop.dt is None:
        found = s.imag[np.abs(s.real) <= AXIS_TOLERANCE * (1 + np.abs(s))]
    else:
        found = np.angle(s[np.abs(np.abs(s) - 1) <= AXIS_TOLERANCE]) / loop.dt
    # The ends of the axis always solve the first equation; a pole there is no crossing.
    ends = [0.0] if loop.dt is None else [0.0, np.pi / loop.dt]
    away = [min(abs(z - (1j * w if loop.dt is None else np.exp(1j * w * loop.dt))) for z in [*poles(loop), np.inf])
            for w in [*found, *ends]]  # fmt: skip
    candidates = np.abs([*found, *ends])[np.array(away) > 1e-9]
    candidates = np.unique(candidates.round(12))
    values = frequency_response(loop, candidates)[:, 0, 0]
    wrong = np.abs(np.abs(values) - 1) if product else np.abs(values.imag)
    return np.asarray(candidates[wrong <= 1e-5 * (1 + np.abs(values))])


def _check_times(where: str, system: StateSpace, times: Float[np.ndarray, " l"] | int) -> None:
    if (system.dt is None) != isinstance(times, np.ndarray):
        wanted = "an array of times" if system.dt is None else "a number of steps"
        kind = "continuous" if system.dt is None else "discrete"
        raise ValueError(f"{where}: a {kind} system wants {wanted}, not {type(times).__name__}")
