"""A language model: tokens in, logits out, a stack in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .._shapes import Float, Int, Tensor
from ..timeline import Timeline
from ._config import from_config
from ._tied import Embedding, Head, gradients_meet
from .stack import LayerSpec, Stack


class LanguageModel(nn.Module):
    """Predict the next token of each sequence at each step.

        logits_t = W_lm Stack(embedding(tokens))_t / divisor,    then cap · tanh(logits / cap) if there is a cap

    Args:
        vocab_size: Tokens that exist.
        d_model: Channels of the residual stream.
        layers: For each layer the name of a mixer or a mapping, as in ``Stack``.
        mlp: The channel mixer after each mixer, as in ``Stack``; none when absent.
        tie_embeddings: Whether W_lm is the embedding itself.
        pad_vocab_size_multiple: Rows of the embedding are filled up to a multiple of this; logits have as many entries.
        norm_eps: ε of all norms of the stack.
        residual_in_fp32: Whether the residual stream stays in float32 when the weights are narrower.
        checkpoint_activations: Whether blocks recompute their insides in the backward pass.
        norm_offset: Added to the weights of all norms of the stack.
        embedding_multiplier: Factor of what the embedding gives.
        residual_multiplier: Factor of what each mixer and each channel mixer adds.
        logits_divisor: Divides the logits.
        logits_soft_cap: Bound that the logits approach; none when absent.

    Attributes:
        config: These arguments, ready for JSON.

    Raises:
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        layers: Sequence[LayerSpec],
        mlp: Mapping[str, Any] | None = None,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 1,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        checkpoint_activations: bool = False,
        norm_offset: float = 0.0,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_divisor: float = 1.0,
        logits_soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        if min(vocab_size, d_model, pad_vocab_size_multiple) < 1:
            raise ValueError(
                f"LanguageModel(vocab_size={vocab_size}, d_model={d_model}, "
                f"pad_vocab_size_multiple={pad_vocab_size_multiple}): sizes start at 1"
            )
        if logits_divisor == 0 or (logits_soft_cap is not None and not logits_soft_cap > 0):
            raise ValueError(
                f"LanguageModel(logits_divisor={logits_divisor}, logits_soft_cap={logits_soft_cap}): wanted a divisor "
                f"other than 0, and a cap above 0 or None"
            )
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "layers": [layer if isinstance(layer, str) else dict(layer) for layer in layers],
            "mlp": None if mlp is None else dict(mlp),
            "tie_embeddings": tie_embeddings,
            "pad_vocab_size_multiple": pad_vocab_size_multiple,
            "norm_eps": norm_eps,
            "residual_in_fp32": residual_in_fp32,
            "checkpoint_activations": checkpoint_activations,
            "norm_offset": norm_offset,
            "embedding_multiplier": embedding_multiplier,
            "residual_multiplier": residual_multiplier,
            "logits_divisor": logits_divisor,
            "logits_soft_cap": logits_soft_cap,
        }
        self.vocab_size = vocab_size
        rows = -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple
        # Neither is drawn as torch would: it takes long for so many numbers, and they are drawn below.
        embedding = Embedding.from_pretrained(torch.empty(rows, d_model), freeze=False)
        self.backbone = Stack(
            d_model,
            layers,
            mlp,
            embedding,
            norm_eps,
            residual_in_fp32,
            checkpoint_activations,
            norm_offset,
            embedding_multiplier,
            residual_multiplier,
        )
        self.lm_head = Head(d_model, 1, bias=False)
        self.lm_head.out_features = rows
        self.lm_head.weight = embedding.weight if tie_embeddings else nn.Parameter(torch.empty(rows, d_model))
        self._tie()
        self._draw_embeddings()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LanguageModel:
        """Build a model from the ``config`` of another, or one read from JSON.

        Raises:
            ValueError: If an entry is missing, unknown or of the wrong kind.
        """
        return from_config(cls, config)

    def reset_parameters(self) -> None:
        """Give every parameter its initial value; also after construction on the meta device and ``to_empty``."""
        self._tie()
        self.backbone.reset_parameters()
        self._draw_embeddings()

    def _tie(self) -> None:
        if self.config["tie_embeddings"]:
            self.lm_head.weight = self.backbone.embedding.weight  # type: ignore[union-attr, assignment]

    def _draw_embeddings(self) -> None:
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)  # type: ignore[union-attr, arg-type]
        if not self.config["tie_embeddings"]:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        """Return the states of ``batch_size`` sequences before their first token, one for each layer."""
        return self.backbone.initial_state(batch_size)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: tuple[Any, ...] | None = None,
        timeline: Timeline | None = None,
    ) -> tuple[Float[Tensor, "b t v"], tuple[Any, ...]]:
        """Return the logits of the token after each step, and the states of all layers.

        Args:
            tokens: Token numbers.
            state: The state before them; the initial one when absent.
            timeline: Where sequences begin, and which steps count.

        Raises:
            ValueError: If the tokens are not of shape ``[b t]``.
        """
        if tokens.ndim != 2:
            raise ValueError(f"LanguageModel: tokens of shape {list(tokens.shape)}, wanted [batch, time]")
        with gradients_meet():
            x, state = self.backbone(tokens, state, timeline)
            return self.logits(x), state

    def logits(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Return the logits of what the stack gave, which need not be that of all steps."""
        return bounded(self.lm_head(x), self.config["logits_divisor"], self.config["logits_soft_cap"])

    def loss(
        self,
        tokens: Int[Tensor, "b t"],
        targets: Int[Tensor, "b t"],
        state: tuple[Any, ...] | None = None,
        timeline: Timeline | None = None,
    ) -> tuple[Float[Tensor, ""], tuple[Any, ...]]:
        """Return the mean cross-entropy in nats per token, targets of −100 left out, and the states of all layers."""
        logits, state = self(tokens, state, timeline)
        wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, targets.flatten()), state


def bounded(logits: Float[Tensor, "b t v"], divisor: float, soft_cap: float | None) -> Float[Tensor, "b t v"]:
    """Return logits / divisor, and of that cap · tanh(logits / cap) if there is a cap."""
    if divisor != 1:
        logits = logits / divisor
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
