"""The product with a matrix of weights."""

from __future__ import annotations

import torch

from ..._shapes import Float, Shaped, Tensor
from .._register import choose, expect, list_backends, with_kernel
from . import chunked, cpu, reference

_FORWARD = with_kernel(cpu.linear, chunked.linear)


def linear(
    x: Float[Tensor, "*b i"],
    weight: Shaped[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None = None,
    scale: Float[Tensor, "o groups"] | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "*b o"]:
    """Multiply rows with a matrix, and add a bias.

        y_o = Σ_i W_oi x_i + b_o,    of int8 weights q:  W_oi = scale_og q_oi,  g = ⌊i / (inputs / groups)⌋

    For a few rows on the CPU, such as tokens being decoded, a compiled kernel reads the weights once, as fast as memory
    gives them. Where there are more, or a gradient is wanted, this is torch's own product.

    Args:
        x: Rows.
        weight: W, in the type of x, or int8.
        bias: b.
        scale: Of int8 weights: a factor for each output and each group of inputs that lie side by side.
        dtype: The type of y, in which the bias is added; that of x when absent.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        y.

    Raises:
        ValueError: If int8 weights come without scales or others with them, the inputs do not divide into groups, or
            the backend does not exist or does not take the arguments.
    """
    if scale is not None or weight.dtype is torch.int8 or backend is not None:
        _check(weight, scale)
    refusal = cpu.refusal(x, weight, bias, scale, dtype)
    if backend is None and not refusal:
        return cpu.linear(x, weight, bias, scale, dtype)
    backend = choose("linear", backend, {"cpu": refusal})
    return (reference.linear if backend == "reference" else _FORWARD[backend])(x, weight, bias, scale, dtype)


def _check(weight: Tensor, scale: Tensor | None) -> None:
    """Check that scales go with weights."""
    if (scale is None) == (weight.dtype is torch.int8):
        raise ValueError(
            f"linear: weights of type {weight.dtype} came {'without' if scale is None else 'with'} scales. Scales "
            f"[outputs groups] belong to int8 weights, and only to those."
        )
    if scale is not None:
        outputs, inputs = weight.shape
        expect("linear", "scale", scale, (outputs, scale.shape[-1]))
        if scale.shape[1] < 1 or inputs % scale.shape[1]:
            raise ValueError(f"linear: {inputs} inputs do not divide into {scale.shape[1]} groups, each with its scale")


list_backends("linear", _FORWARD)
