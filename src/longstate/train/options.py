"""The options of a training run: one list behind the command line, the configuration file and the saved run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .._errors import nearest

PRECISIONS = ("float32", "bfloat16")
# What may change when a run is taken up again: how long it goes on, what it reports, and where it runs.
_CHANGEABLE = {
    "out",
    "steps",
    "minutes",
    "device",
    "log_every",
    "validate_every",
    "checkpoint_seconds",
    "sample_tokens",
}

_MAY_BE_ZERO = {"seed", "warmup", "weight_decay", "checkpoint_seconds", "sample_tokens"}


def _option(default: Any, help: str) -> Any:
    """Return a dataclass field that carries its help text."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**made, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Options of a training run; each field's help text is its description.

    Raises:
        ValueError: If a value is out of its range; the message says which and what it may be.
    """

    text: list[str] = _option(list, "Text files or folders; without any, the sources of Python's standard library.")
    out: str = _option("runs/first", "Folder for the model, its checkpoint, logs and plot.")
    steps: int | None = _option(
        None, "Train for this many steps: the result depends on the options and the seed alone."
    )
    minutes: float | None = _option(
        None, "Train for so long, resumed parts added up; 3 if neither this nor --steps is given."
    )
    model: str = _option(
        "mamba2",
        "A mixer's name, or a list of layers in YAML, as in '[mamba2, {mixer: attention, n_heads: 4}]', repeated.",
    )
    d_model: int = _option(128, "Width of the model.")
    n_layers: int = _option(4, "Number of layers.")
    mlp: int | None = _option(None, "Width of a gated MLP in each layer; without it there is none.")
    tokenizer: str = _option("bytes", "'bytes', or the path of a Hugging Face tokenizer.json.")
    context: int = _option(256, "Tokens of a training window.")
    batch_size: int = _option(8, "Windows of a step.")
    carry_state: bool = _option(False, "Read the text in order and carry the state from step to step.")
    learning_rate: float = _option(2e-3, "Largest learning rate.")
    warmup: float = _option(0.05, "Part of the run in which the learning rate rises; it falls as a cosine after that.")
    weight_decay: float = _option(0.1, "Weight decay of the matrices; everything else has none.")
    clip: float = _option(1.0, "Largest norm of the gradient.")
    seed: int = _option(0, "Seed of the weights and of the batches.")
    precision: str = _option("float32", "'float32' or 'bfloat16' (weights stay float32).")
    device: str = _option("auto", "'auto', 'cpu' or 'cuda'.")
    log_every: int = _option(10, "Steps between two rows of the log.")
    validate_every: int = _option(100, "Steps between two validations; there is one at the end in any case.")
    validation_fraction: float = _option(0.05, "Part of the text that is held out for validation, by documents.")
    validation_tokens: int = _option(16384, "Tokens of the held-out text that a validation reads.")
    checkpoint_seconds: float = _option(60.0, "Seconds between two checkpoints.")
    sample_tokens: int = _option(300, "Tokens of the sample at the end; 0 for none.")

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "minutes", 3.0)  # frozen for everyone else
        numbers = {name: value for name, value in vars(self).items() if type(value) in (int, float)}
        for name, value in numbers.items():
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise ValueError(f"{_flag(name)} is {value}; it must be above 0.")
        for name in ("warmup", "validation_fraction"):
            if not numbers[name] < 1:
                raise ValueError(f"{_flag(name)} is {numbers[name]}; it is a part of the whole, below 1.")
        for name, known in (("precision", PRECISIONS), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)!r}.{nearest(getattr(self, name), known)}")

    @property
    def layers(self) -> list[str | dict[str, Any]]:
        """The layers of the model, as ``LanguageModel`` takes them."""
        try:
            pattern = yaml.safe_load(self.model)
        except yaml.YAMLError as error:
            raise ValueError(f"--model is {self.model!r}: not a mixer's name, nor a list of layers in YAML.") from error
        pattern = pattern if isinstance(pattern, list) else [pattern]
        if not pattern or not all(isinstance(layer, str | dict) for layer in pattern):
            raise ValueError(
                f"--model is {self.model!r}; a layer is a mixer's name or a mapping such as {{mixer: mamba2}}."
            )
        return [pattern[i % len(pattern)] for i in range(self.n_layers)]

    def to_yaml(self) -> str:
        """Return the options as YAML, which ``read_config`` reads."""
        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        return text


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read options from a YAML file, by the names they have in ``Options``; dashes are as good as underscores.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or holds something that is not an option.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such configuration file. Give a YAML file with options, such as `minutes: 3`."
        )
    try:
        values = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a {type(values).__name__} came; options are `name: value`, such as `minutes: 3`.")
    kinds, found = get_type_hints(Options), {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            raise ValueError(f"{path}: unknown option {key!r}.{nearest(name, kinds)}")
        try:
            found[name] = _fitted(name, value, kinds[name])
        except (TypeError, ValueError) as error:
            wanted = getattr(kinds[name], "__name__", str(kinds[name]))
            raise ValueError(f"{path}: {key} is {value!r}; it must be of type {wanted}.") from error
    return found


def _fitted(name: str, value: Any, kind: Any) -> Any:
    """Return what YAML holds as the type of the option."""
    if name == "text":
        return [str(path) for path in (value if isinstance(value, list) else [value])]
    if name == "model":
        return value if isinstance(value, str) else json.dumps(value)  # JSON is YAML, and the option is a text
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    if kind in (float, float | None):
        return float(value)  # YAML takes 1 for an integer and 1e-3 for a string
    raise TypeError


def resumed(saved: Options, given: Mapping[str, Any]) -> Options:
    """Return the options of a run that is taken up again: the saved ones, with what may change as it is given now.

    Raises:
        ValueError: If something is given that would make it another run.
    """
    for name, value in given.items():
        if name not in _CHANGEABLE and value != getattr(saved, name):
            raise ValueError(
                f"{_flag(name)} is {value}, but the run began with {getattr(saved, name)}. "
                f"Leave it out to go on with --resume, or begin a new run with another --out."
            )
    return dataclasses.replace(saved, **given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
