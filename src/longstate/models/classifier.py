"""A classifier: a sequence of features in, one logit a class out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from .._errors import check_choice
from .._shapes import Bool, Float, Tensor
from ..timeline import Timeline, zero_where_invalid
from ._config import from_config
from .stack import Block, LayerSpec, Stack


class Classifier(nn.Module):
    """Say to which class each sequence belongs.

        logits = W_head pooling(Stack_k(… W_1 shorten(Stack_1(W_in x)) …))

    A stack reads the sequence at the input's rate. With ``pool``, what it gives is averaged over windows of so many
    nominal steps, which are the steps of the next stack; with ``expand``, that one has more channels. Windows are cut
    by elapsed time, not by counting: at half the sampling rate (``dt`` = 2) they hold half as many steps, and later
    stacks see the rate that they were trained at.

    Args:
        d_input: Features of a step.
        n_classes: Classes that exist.
        d_model: Channels of the residual stream at the input's rate.
        layers: For each layer the name of a mixer or a mapping, as in ``Stack``.
        mlp: The channel mixer after each mixer, as in ``Stack``; none when absent.
        pool: For each layer, how many of its nominal steps are averaged into one after it; 1 for all when absent.
        expand: By how much each averaging widens the residual stream, by a linear map.
        pooling: What of the steps that count goes to the head: their "mean", or the "last".
        norm_eps: ε of all norms.

    Attributes:
        config: These arguments, ready for JSON.

    Raises:
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        d_input: int,
        n_classes: int,
        d_model: int,
        layers: Sequence[LayerSpec],
        mlp: Mapping[str, Any] | None = None,
        pool: Sequence[int] | None = None,
        expand: int = 1,
        pooling: Literal["mean", "last"] = "mean",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(d_input, n_classes, d_model, expand) < 1:
            raise ValueError(f"Classifier({d_input=}, {n_classes=}, {d_model=}, {expand=}): sizes start at 1")
        check_choice("Classifier", "pooling", pooling, ("mean", "last"))
        pool = [1] * len(layers) if pool is None else list(pool)
        if len(pool) != len(layers) or not all(isinstance(factor, int) and factor >= 1 for factor in pool):
            raise ValueError(
                f"Classifier(pool={pool}): wanted a whole number from 1 for each of the {len(layers)} layers, "
                f"such as {[8, *[1] * (len(layers) - 1)]}"
            )
        self.config: dict[str, Any] = {
            "d_input": d_input,
            "n_classes": n_classes,
            "d_model": d_model,
            "layers": [layer if isinstance(layer, str) else dict(layer) for layer in layers],
            "mlp": None if mlp is None else dict(mlp),
            "pool": pool,
            "expand": expand,
            "pooling": pooling,
            "norm_eps": norm_eps,
        }
        self.d_input, begin = d_input, 0
        self.encoder = nn.Linear(d_input, d_model)
        self.stacks, self.widen, self.factors = nn.ModuleList(), nn.ModuleList(), list[int]()
        for end, factor in enumerate(pool, 1):
            if factor == 1 and end < len(pool):
                continue
            self.stacks.append(Stack(d_model, layers[begin:end], mlp, norm_eps=norm_eps))
            wider = expand > 1 and end < len(pool)
            self.widen.append(nn.Linear(d_model, expand * d_model) if wider else nn.Identity())
            self.factors.append(factor)
            begin, d_model = end, expand * d_model if wider else d_model
        self.head = nn.Linear(d_model, n_classes)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Classifier:
        """Build a model from the ``config`` of another, or one read from JSON.

        Raises:
            ValueError: If an entry is missing, unknown or of the wrong kind.
        """
        return from_config(cls, config)

    def reset_parameters(self) -> None:
        """Give every parameter its initial value."""
        self.encoder.reset_parameters()
        self.head.reset_parameters()
        for stack, widen in zip(self.stacks, self.widen, strict=True):
            cast(Stack, stack).reset_parameters()
            if isinstance(widen, nn.Linear):
                widen.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"], timeline: Timeline | None = None) -> Float[Tensor, "b v"]:
        """Return the logits of each sequence.

        Args:
            x: Features; real numbers.
            timeline: The time before each step, and which steps count: padding may stand anywhere.

        Raises:
            ValueError: If shapes do not go together, or the timeline begins other sequences inside a row.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_input or not x.shape[1]:
            raise ValueError(
                f"Classifier: input of shape {list(x.shape)}, wanted [batch, time, d_input={self.d_input}] with at "
                f"least one step"
            )
        timeline = Timeline() if timeline is None else timeline
        if timeline.start is not None:
            raise ValueError("Classifier: the timeline has start, but a row is one sequence here. Give each its row.")
        timeline.expand(x.shape[0], x.shape[1])
        x = self.encoder(x)
        for stack, factor, widen in zip(self.stacks, self.factors, self.widen, strict=True):
            x = cast(Stack, stack)(x, None, _needed(cast(Stack, stack), timeline))[0]
            x, timeline = shorten(x, timeline, factor)
            x = widen(x)
        return self.head(self._pooled(x, timeline.expand(x.shape[0], x.shape[1]).valid))

    def _pooled(self, x: Float[Tensor, "b t d"], valid: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b d"]:
        if self.config["pooling"] == "mean":
            return x.mean(1) if valid is None else _mean(x, valid)
        if valid is None:
            return x[:, -1]
        steps = torch.arange(x.shape[1], device=x.device)
        last = torch.where(valid, steps, -1).amax(1)
        return x[torch.arange(len(x), device=x.device), last.clamp(min=0)] * (last >= 0)[:, None]


def _mean(x: Float[Tensor, "b t d"], valid: Bool[Tensor, "b t"]) -> Float[Tensor, "b d"]:
    """Return the mean over the steps that count; zeros where none does."""
    return zero_where_invalid(x, valid).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def _right_padded(valid: Bool[Tensor, "..."]) -> bool:
    """Return whether the steps that count come first in each row."""
    return not bool((valid[..., 1:] & ~valid[..., :-1]).any())


def _needed(stack: Stack, timeline: Timeline) -> Timeline | None:
    """Return the timeline without what changes no output that counts.

    Behind the last step that counts, a causal mixer may read what it likes; without padding to step over it may take a
    faster face.
    """
    mixers = [cast(Block, block).mixer for block in stack.layers]
    causal = not torch.compiler.is_compiling() and all(mixer is None or mixer.causal for mixer in mixers)
    if timeline.valid is not None and causal and _right_padded(timeline.valid):
        timeline = timeline._replace(valid=None)
    return None if timeline.dt is None and timeline.valid is None else timeline


def shorten(x: Float[Tensor, "b t d"], timeline: Timeline, factor: int) -> tuple[Float[Tensor, "b s d"], Timeline]:
    """Average the steps that count over windows of ``factor`` nominal steps, which become the nominal steps.

    The first window begins with the first step that counts. A window that no step falls into does not count; the time
    that passes there is elapsed before the next one that does.
    """
    if factor == 1:
        return x, timeline
    dt, valid = timeline.dt, timeline.valid
    step = 1.0 if dt is None else float(dt) if dt.numel() == 1 else 0.0
    if step > 0 and (factor / step).is_integer() and (valid is None or _right_padded(valid)):
        return _evenly(x, valid, int(factor / step))
    return _by_time(x, timeline, factor)


def _evenly(x: Tensor, valid: Tensor | None, count: int) -> tuple[Tensor, Timeline]:
    """Average each ``count`` steps, of which the last may be fewer."""
    fill = -x.shape[1] % count
    if valid is None and not fill:
        return x.unflatten(1, (-1, count)).mean(2), Timeline()
    every = torch.ones(1, 1, dtype=torch.bool, device=x.device) if valid is None else valid
    every = every.expand(x.shape[:2])
    number = functional.pad(every, (0, fill)).unflatten(1, (-1, count)).sum(2)
    total = functional.pad(zero_where_invalid(x, every), (0, 0, 0, fill)).unflatten(1, (-1, count)).sum(2)
    return total / number.clamp(min=1)[..., None], Timeline(valid=None if valid is None else number > 0)


def _by_time(x: Tensor, timeline: Timeline, factor: int) -> tuple[Tensor, Timeline]:
    """Average over windows of time, whatever steps fall into them."""
    (batch, length, channels), (dt, _, valid) = x.shape, timeline.expand(*x.shape[:2])
    valid = x.new_ones(batch, length, dtype=torch.bool) if valid is None else valid
    elapsed = x.new_ones(batch, length) if dt is None else dt
    # In double precision, and with room for its rounding: a window must not lose a step to a sum of tenths.
    elapsed = zero_where_invalid(elapsed.to(torch.float64), valid)
    first = valid & (valid.cumsum(1) == 1)
    window = (elapsed.masked_fill(first, 0).cumsum(1) / factor + 1e-9).floor().long()
    windows = int(window.max()) + 1
    number = torch.zeros(batch, windows, dtype=torch.long, device=x.device).scatter_add_(1, window, valid.long())
    kept = zero_where_invalid(x, valid)
    total = x.new_zeros(batch, windows, channels).scatter_add(1, window[..., None].expand_as(x), kept)
    place = torch.arange(windows, device=x.device).expand(batch, windows)
    latest = torch.where(number > 0, place, -1).cummax(1).values
    before = functional.pad(latest[:, :-1], (1, 0), value=-1)
    gap = None if dt is None else torch.where(before < 0, 1, place - before).to(dt.dtype)
    return total / number.clamp(min=1)[..., None], Timeline(dt=gap, valid=number > 0)
