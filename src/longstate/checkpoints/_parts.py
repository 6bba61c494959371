"""Parts of a model and their options, in both directions, so that nothing is lost in silence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..mixers import MIXERS
from ..models import LanguageModel
from ..models.stack import CHANNEL_MIXERS
from ..routes import ROUTES
from ._options import Options

# What only says how a model begins, how it is rounded or trained; not what it computes.
WITHOUT_EFFECT = frozenset({"dt_min", "dt_max", "residual_in_fp32", "checkpoint_activations"})


class Settings(NamedTuple):
    """All options of a part, and what each would be if it were left out.

    Attributes:
        where: What has them, for messages.
        kind: Which mixer or channel mixer; "" for the model.
        values: The options, numbers in the place of None where None stands for one.
        usual: What they would be.
    """

    where: str
    kind: str
    values: dict[str, Any]
    usual: dict[str, Any]


class Layer(NamedTuple):
    """A layer of ours: mixer and channel mixer, either of which may be absent."""

    where: str
    mixer: Settings | None
    mlp: Settings | None


@dataclass(frozen=True)
class Part:
    """A mixer, a channel mixer or the model itself: under which names a family keeps our options.

    Attributes:
        kind: The mixer's or channel mixer's name; "" for the model.
        options: For our options theirs, with the family's default.
        fixed: Our options that are the same in all models of the family.
        other: Our options that the family keeps in a way of its own.
    """

    kind: str
    options: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    other: Collection[str] = ()

    def read(self, options: Options) -> dict[str, Any]:
        """Return our options."""
        taken = {ours: options.take(theirs, default) for ours, (theirs, default) in self.options.items()}
        key = {} if not self.kind else {"mixer" if self.kind in MIXERS else "kind": self.kind}
        return {**key, **self.fixed, **taken}

    def write(self, settings: Settings) -> dict[str, Any]:
        """Return their options.

        Raises:
            ValueError: If the family has no place for one of ours, or not for its value.
        """
        written: dict[str, Any] = {}
        for name, value in settings.values.items():
            if name in self.options:
                theirs, default = self.options[name]
                kind = type(default)
                if value is None or (kind is int and not float(value).is_integer()):
                    raise ValueError(
                        f"{settings.where}: {name} is {value}; the family wants a {'whole ' * (kind is int)}number"
                    )
                written[theirs] = kind(value)
            elif name not in self.other and name not in WITHOUT_EFFECT:
                only = self.fixed.get(name, settings.usual.get(name))
                if value != only:
                    raise ValueError(f"{settings.where}: {name} is {value!r}; the family has only {only!r}")
        return written


Writer = Callable[[Settings], Mapping[str, Any]]


def write_layers(
    model: LanguageModel, mixers: Mapping[str | None, Writer | None], mlps: Mapping[str | None, Writer | None]
) -> tuple[list[Layer], dict[str, Any]]:
    """Return a model's layers, and their options, which all layers of a kind must have in common.

    Args:
        model: The model.
        mixers: What writes the options of each mixer that the family has; None for none.
        mlps: The same for channel mixers.

    Raises:
        ValueError: If a layer is none of the family's, or two layers differ.
    """
    config, found = model.config, list[Layer]()
    written: dict[str, Any] = {}
    for i, spec in enumerate(config["layers"]):
        where = f"layers[{i}]"
        options: dict[str, Any] = {"mixer": spec} if isinstance(spec, str) else dict(spec)
        mixer, mlp = options.pop("mixer"), options.pop("mlp", config["mlp"])
        first = None if mixer is None else _settings(where, mixer, config["d_model"], options)
        second = None
        if mlp is not None:
            rest = {name: value for name, value in mlp.items() if name != "kind"}
            second = _settings(f"{where}.mlp", mlp.get("kind", "gated"), config["d_model"], rest)
        found.append(Layer(where, first, second))
        for title, settings, known in (("mixer", first, mixers), ("mlp", second, mlps)):
            kind = None if settings is None else settings.kind
            if kind not in known:
                raise ValueError(f"{where}: {title} is {kind!r}; the family has only {', '.join(map(repr, known))}")
            writer = known[kind]
            if settings is not None and writer is not None:
                written = merged(settings.where, written, writer(settings))
    return found, written


def model_settings(model: LanguageModel) -> Settings:
    """Return a model's own options, with the rows of its embedding as vocabulary."""
    usual = _defaults("")
    values = {**usual, **model.config}
    multiple = values.pop("pad_vocab_size_multiple")
    values["vocab_size"] = -(-values["vocab_size"] // multiple) * multiple
    for name in ("layers", "mlp"):
        values.pop(name)
    return Settings("the model", "", values, usual)


def merged(where: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of both.

    Raises:
        ValueError: If they differ in one.
    """
    for name in other:
        if name in one and one[name] != other[name]:
            raise ValueError(
                f"{where}: {name} is {other[name]!r} here and {one[name]!r} elsewhere; the family has one for all"
            )
    return {**one, **other}


def period(where: str, flags: Iterable[bool]) -> tuple[int, int]:
    """Return the period and offset with which flags are set.

    Raises:
        ValueError: If they are not set in turn.
    """
    flags = list(flags)
    for size in range(1, len(flags) + 2):
        for offset in range(size):
            if all(flag == (i % size == offset) for i, flag in enumerate(flags)):
                return size, offset
    chosen = [i for i, flag in enumerate(flags) if flag]
    raise ValueError(f"{where} are layers {chosen}; the family has them in turn only")


def _defaults(kind: str) -> dict[str, Any]:
    owner: Any = {"": LanguageModel, **MIXERS, **ROUTES, **CHANNEL_MIXERS}[kind]
    parameters = inspect.signature(owner.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _settings(where: str, kind: str, d_model: int, given: Mapping[str, Any]) -> Settings:
    """Return all options of a part, with numbers in the place of None where None stands for one."""
    usual = _defaults(kind)
    values = {**usual, **given}
    follow: dict[str, Callable[[], Any]] = {
        "n_kv_heads": lambda: values["n_heads"],
        "head_dim": lambda: d_model // values["n_heads"],
        "rotary_dim": lambda: values["head_dim"],
        "scale": lambda: values["head_dim"] ** -0.5,
        "out_bias": lambda: values["bias"],
        "dt_rank": lambda: math.ceil(d_model / 16),
        "norm_groups": lambda: values["n_groups"],
        "d_inner": lambda: int(values["expand"] * d_model) if "expand" in values else d_model,
        "d_ssm": lambda: values["d_inner"],
        "hidden": lambda: 4 * d_model if kind == "plain" else 64 * math.ceil(d_model * 8 / 3 / 64),
    }
    for name, value in follow.items():
        if name in usual and usual[name] is None:
            usual[name] = value()
            if values[name] is None:
                values[name] = usual[name]
    return Settings(where, kind, values, usual)
