"""Convolutions with kernels as long as their input."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import pad

from .._shapes import Float, Tensor
from ..ops import convolution
from ..ops.convolution.chunked import fft
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
