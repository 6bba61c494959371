"""Int8 weights: a quarter of the memory of float32, and of the time that a token takes to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Int, Tensor
from ..mixers._parts import Linear
from ..mixers.mamba import StepProjection
from ..models._tied import Embedding, Head
from ..models.experts import Experts
from ..ops import linear
from ..ops.linear.chunked import CHUNK, widened

KINDS = ("int8",)
_LARGEST = 127  # −128 is left out: it would have no counterpart
_LINEAR = (nn.Linear, Linear, StepProjection, Head)  # not routers, whose near ties are real choices
_EMBEDDING = (nn.Embedding, Embedding)

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """A linear map with int8 weights, W_oi = scale_og quantized_oi, where group g is that of input i.

    Args:
        layer: The layer that it replaces, whose bias it takes.
        quantized: The weights, in [−127, 127].
        scale: Their scales, for each output and group.
    """

    is_product = True  # as in ``Linear``

    def __init__(self, layer: nn.Linear, quantized: nn.Parameter, scale: nn.Parameter) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantized, self.scale, self.bias = quantized, scale, layer.bias
        self.wide = isinstance(layer, StepProjection)  # whether the bias is added in float32 at least

    @property
    def weight(self) -> Tensor:
        """What the weights stand for, in the type of the scales; made anew each time."""
        return widened(self.quantized, self.scale, self.scale.dtype)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """Return the product with the weights, and the bias."""
        dtype = torch.promote_types(self.bias.dtype, torch.float32) if self.wide else None
        return linear(x, self.quantized, self.bias, self.scale, dtype=dtype)


class QuantizedEmbedding(nn.Module):
    """An embedding with int8 rows: those of the head, where it is the embedding.

    Args:
        quantized: The rows, in [−127, 127].
        scale: Their scales, for each row and group.
    """

    def __init__(self, quantized: nn.Parameter, scale: nn.Parameter) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.quantized, self.scale = quantized, scale

    @property
    def weight(self) -> Tensor:
        """What the rows stand for, in the type of the scales; made anew each time."""
        return widened(self.quantized, self.scale, self.scale.dtype)

    def forward(self, tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Return the rows of tokens, in the type of the scales."""
        return widened(self.quantized[tokens], self.scale[tokens], self.scale.dtype)


class QuantizedExperts(Experts):
    """Routed experts whose matrices are int8, each with scales as in ``QuantizedLinear``."""

    @classmethod
    def replace(cls, experts: Experts, group: int | None) -> None:
        """Make such experts of others, in place."""
        for name in ("fc1", "fc2"):
            weight = getattr(experts, name)
            quantized, scale = _rounded(weight.flatten(0, 1), group)
            delattr(experts, name)
            setattr(experts, f"{name}_quantized", nn.Parameter(quantized.view_as(weight), False))
            setattr(experts, f"{name}_scale", nn.Parameter(scale.unflatten(0, weight.shape[:2]), False))
        experts.__class__ = cls

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{name}_quantized"), getattr(self, f"{name}_scale")

    def __getattr__(self, name: str) -> Any:
        """What the matrices stand for, in the type of the scales; made anew each time."""
        if name not in ("fc1", "fc2"):
            return super().__getattr__(name)
        quantized, scale = self._matrices(name)
        return widened(quantized, scale, scale.dtype)

    def _products(self) -> tuple[Callable[[int, Tensor], Tensor], ...]:
        """Return the products with the two matrices of an expert."""
        (fc1, scale1), (fc2, scale2) = self._matrices("fc1"), self._matrices("fc2")
        return lambda e, x: linear(x, fc1[e], None, scale1[e]), lambda e, x: linear(x, fc2[e], None, scale2[e])


def quantize(model: AnyModule, kind: str = "int8", group: int | None = None) -> AnyModule:
    """Replace the weights of a model's linear layers by int8 numbers with scales, in place.

        W_oi ≈ scale_og q_oi,    scale_og = max_{i in g} |W_oi| / 127,    q = round(W / scale)

    so that no weight changes by more than half a scale. So are routed experts. Activations, norms, convolutions,
    biases, A, D and routers keep their types. A head that is the embedding stays so: both read the same int8 rows. The
    weights are not trained any more, but gradients pass through the layers.

    Args:
        model: A ``LanguageModel`` or any other module, in eval mode.
        kind: "int8".
        group: How many inputs that lie side by side share a scale; all of an output's when absent. A layer with fewer
            inputs has one scale for each output.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such kind, the model is in training mode, quantised already or without linear layers,
            the inputs of a layer do not divide into groups, or a weight is not finite. The model is unchanged then.

    Source:
        Jacob et al., arXiv:1712.05877, symmetric and of weights only.
    """
    check_choice("quantize", "kind", kind, KINDS)
    if group is not None and group < 1:
        raise ValueError(f"quantize(group={group}): wanted a number of inputs, such as 128, or None for all")
    if model.training:
        raise ValueError(
            "quantize: the model is in training mode, and int8 weights are not trained. Call eval() first."
        )
    if any(isinstance(module, QuantizedLinear | QuantizedExperts) for module in model.modules()):
        raise ValueError("quantize: the model is quantised already. Take the original one.")
    places: dict[int, list[str]] = {}  # the layers of each weight: what is shared stays so
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module) in _LINEAR + _EMBEDDING:
            places.setdefault(id(module.weight), []).append(name)
    shared = [names for names in places.values() if any(type(model.get_submodule(x)) in _LINEAR for x in names)]
    experts = {name: module for name, module in model.named_modules() if type(module) is Experts}
    if not shared and not experts:
        raise ValueError(f"quantize: {type(model).__name__} holds no linear layer. Give a model that does.")
    for name, *_ in shared:
        _check(name, model.get_parameter(f"{name}.weight"), group)
    for name, module in experts.items():
        _check(name, module.fc1, group)
        _check(name, module.fc2, group)
    for names in shared:
        weights = [nn.Parameter(x, False) for x in _rounded(model.get_parameter(f"{names[0]}.weight"), group)]
        for name in names:
            owner, _, leaf = name.rpartition(".")
            old = model.get_submodule(name)
            new = QuantizedLinear(old, *weights) if isinstance(old, nn.Linear) else QuantizedEmbedding(*weights)
            setattr(model.get_submodule(owner), leaf, new.eval())
    for module in experts.values():
        QuantizedExperts.replace(module, group)
    return model


def _check(name: str, weight: Tensor, group: int | None) -> None:
    """Check that a layer can be quantised."""
    inputs = weight.shape[-1]
    if group is not None and inputs > group and inputs % group:
        raise ValueError(
            f"quantize(group={group}): {name} has {inputs} inputs, which do not divide into groups of {group}. "
            f"Choose a divisor, or leave it out."
        )
    if not weight.isfinite().all():
        raise ValueError(
            f"quantize: the weights of {name} are not all finite. Take the model from before they became so."
        )


@torch.no_grad()
def _rounded(weight: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Return int8 weights and scales, some rows at a time."""
    outputs, inputs = weight.shape
    groups = 1 if group is None or inputs <= group else inputs // group
    quantized, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(outputs, groups)
    rows = max(1, CHUNK // inputs)
    for q, s, w in zip(quantized.split(rows), scale.split(rows), weight.split(rows), strict=True):
        w = w.to(torch.promote_types(w.dtype, torch.float32)).unflatten(1, (groups, -1))
        s.copy_(w.abs().amax(-1) / _LARGEST)
        # In bfloat16 a scale may have become smaller, and a weight then a little more than 127 of it.
        q.copy_((w / s.to(w.dtype).where(s > 0, 1)[..., None]).round_().clamp_(-_LARGEST, _LARGEST).flatten(1))
    return quantized, scale
