"""Convolutions with kernels as long as their input."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import pad

from .._shapes import Float, Tensor
from ..ops import convolution
from ..ops.convolution.chunked import FEW, fft, good_size
from ..timeline import Compaction, Timeline


def convolve_all(u: Float[Tensor, "b t d"], kernel: Float[Tensor, "d l"], timeline: Timeline) -> Float[Tensor, "b t d"]:
    """Return the causal convolution with a kernel of as many taps as there are steps, within each sequence.

    Steps that do not count are brought behind the others, and come back as zeros. Rows of several sequences are left
    to the op, which halves them: in memory linear in the row, however unequal its sequences are.
    """
    _, start, valid = timeline
    # An exported graph takes any length; the size of a transform that is written here would be one length's.
    if start is not None or torch.compiler.is_exporting():
        # Two taps more, of zero: a window of one step or none would need a graph of its own.
        return convolution.long(u, pad(kernel, (0, 2)), start=start, valid=valid)[0]
    if u.numel() == 0:  # no transform takes what is empty
        return u.clone()
    if valid is None:
        return fft(u, kernel, u.shape[1])
    compaction = Compaction.of(valid)
    return compaction.restore(fft(compaction.compact(u), kernel, u.shape[1]))


def convolve_bank(
    u: Float[Tensor, "b t d"],
    taps: Float[Tensor, "k l"],
    mixing: Float[Tensor, "k o d"],
    window: Float[Tensor, "b window d"] | None,
    timeline: Timeline,
) -> tuple[Float[Tensor, "b t o"], Float[Tensor, "b window d"]]:
    """Return Σ_k M_k Σ_i taps_ki u_{t−i}, of all channels through all filters, and the last inputs.

    In the frequencies, where the features are never all there at once: one transform of every input and of every
    output. Rows of several sequences are left to the op, which takes the features of all filters beside each other.
    """
    _, start, valid = timeline
    (batch, length, width), before = u.shape, taps.shape[1] - 1
    if start is not None or torch.compiler.is_exporting():
        past = None if window is None else window.repeat(1, 1, len(taps))
        kernel = taps.repeat_interleave(width, 0)
        features, final = convolution.long(u.repeat(1, 1, len(taps)), kernel, past, start=start, valid=valid)
        return features @ mixing.mT.flatten(0, 1), final[..., :width].clone()
    compaction = None if valid is None else Compaction.of(valid)
    inputs = u if compaction is None else compaction.compact(u)
    padded = pad(inputs, (0, 0, before, 0)) if window is None else torch.cat([window, inputs], 1)
    if u.numel() == 0:  # no transform takes what is empty, nor a window of nothing
        y = u.new_zeros(batch, length, mixing.shape[1])
    elif length <= FEW:
        features = padded.unfold(1, before + 1, 1) @ taps.flip(1).mT
        y = torch.einsum("btdk,kod->bto", features, mixing)
    else:
        y = _mixed_spectra(padded, taps, mixing)[:, before:]
    if compaction is None:
        return y, padded[:, length:].clone()
    last = compaction.total[:, None] + torch.arange(before, device=u.device)
    return compaction.restore(y), padded.gather(1, last[..., None].expand(-1, -1, width))


def _mixed_spectra(u: Tensor, taps: Tensor, mixing: Tensor) -> Tensor:
    """Return the steps that no step before the first would reach; those before them are wrapped around."""
    length = u.shape[1]
    size = good_size(length)
    spectrum = torch.fft.rfft(u, n=size, dim=1)
    parts = torch.stack([spectrum.real, spectrum.imag])  # the matrices are real
    total = torch.zeros((), dtype=u.dtype.to_complex(), device=u.device)
    for response, matrix in zip(torch.fft.rfft(taps, n=size), mixing, strict=True):
        total = total + response[:, None] * torch.complex(*(parts @ matrix.mT))
    return torch.fft.irfft(total, n=size, dim=1)[:, :length]


def refuse_state(name: str, state: object, remedy: str) -> None:
    """Check that no state came to a mixer that has none.

    Raises:
        ValueError: If one did.
    """
    if state is not None:
        raise ValueError(
            f"{name}: a state came, but a kernel as long as its input has no finite state. Give whole sequences"
            f" without a state{remedy}."
        )


def linear_in(layer: Any, z: Tensor) -> Tensor:
    """Return what a linear layer makes of ``z``, in the type of ``z``: kernels are as exact as float32 in any model."""
    return functional.linear(z, layer.weight.to(z.dtype), None if layer.bias is None else layer.bias.to(z.dtype))
