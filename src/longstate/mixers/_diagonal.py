"""Fixed diagonal systems, convolved or scanned."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .._shapes import Float, Inexact, Tensor
from ..ops import selective_scan, vandermonde
from ..ops.convolution.chunked import fft
from ..ops.vandermonde.chunked import factors
from ..timeline import Timeline

CONVOLUTION_FROM = 64  # steps from which transforms beat the scan


def run_modes(
    u: Float[Tensor, "b t d"],
    log_decay: Inexact[Tensor, "d n"],
    B: Inexact[Tensor, "d n"],
    C: Inexact[Tensor, "d n"],
    initial: Inexact[Tensor, "b d n"] | None,
    timeline: Timeline,
) -> tuple[Float[Tensor, "b t d"], Inexact[Tensor, "b d n"]]:
    """Return outputs and the final state of one fixed diagonal system for each channel.

        h_t = e^{log_decay} ∘ h_{t−1} + B u_t,    y_t = 2 Re(Cᵀ h_t), or Cᵀ h_t of real numbers

    A long plain sequence is convolved, another one scanned. A ``log_decay`` in double precision keeps the digits of
    its multiples.
    """
    plain = timeline.start is None and timeline.valid is None
    # An exported graph takes any length, so it has the face that does.
    if plain and u.shape[1] >= CONVOLUTION_FROM and not torch.compiler.is_exporting():
        return convolve(u, log_decay, B, C, initial)
    A, one = log_decay.to(B.dtype), torch.ones_like(u)
    return selective_scan(u, one, A, B, C, None, initial, start=timeline.start, valid=timeline.valid)


def convolve(
    u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return outputs and the final state by matrix products and transforms alone."""
    length, dtype = u.shape[1], B.dtype
    y = fft(u, vandermonde(C * B, log_decay, length), length)
    # Σ_l Ā^{t−1−l} B̄ u_l, with zeros before the first step to fill the last row; the powers factor into Ā^{ci} Ā^j.
    coarse, fine = (power.flip(-1).to(dtype) for power in factors(log_decay, length))
    rows, columns = coarse.shape[-1], fine.shape[-1]
    filled = pad(u, (0, 0, rows * columns - length, 0)).unflatten(1, (rows, columns))
    if dtype.is_complex:
        partial = torch.einsum("brcd,dncp->bdnrp", filled, torch.view_as_real(fine))
        partial = torch.view_as_complex(partial.contiguous())
    else:
        partial = torch.einsum("brcd,dnc->bdnr", filled, fine)
    final = B * (partial * coarse).sum(-1)
    if initial is not None:
        decay, before = torch.exp(log_decay).to(dtype), initial.to(dtype)
        y = y + vandermonde(C * decay * before, log_decay, length).mT
        final = final + torch.exp(log_decay * length).to(dtype) * before
    return y, final


def log_bilinear(z: Inexact[Tensor, "d n"]) -> Inexact[Tensor, "d n"]:
    """Return log((1 + z/2) / (1 − z/2)), complex, up to multiples of 2πi.

    The real part, of which a quotient near the unit circle has lost most digits, is ½ log(1 + 2 Re z / |1 − z/2|²).
    """
    above, below = 1 + z / 2, 1 - z / 2
    real = torch.log1p(2 * z.real / below.abs().square()) / 2
    # At z = −2 the mode forgets at once; any number with e^x = 0 says so, and infinity times 0 steps would be none.
    return torch.complex(real.clamp(min=-1e3), torch.angle(above) - torch.angle(below))
