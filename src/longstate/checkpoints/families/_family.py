"""What a family of published models is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...models import LanguageModel
from .._options import Options
from .._rows import Row


@dataclass(frozen=True)
class Family:
    """How a family of models is written down: the names of its tensors and of its options.

    Attributes:
        name: What ``model_type`` says in its configurations.
        rows: Their tensors and ours.
        read: From their options to those of ``LanguageModel``.
        write: From a model to their options; None if the family is only read.
        architecture: The class that transformers opens such folders with.
        aliases: Other beginnings of names in files, and what they stand for in the rows.
        ignored: Expressions for names of tensors that are no part of the model.
        config: The file with the options.
        keys: Entries of a configuration without ``model_type`` by which it is recognised.
        weights: Single files with weights, beside model.safetensors.
    """

    name: str
    rows: tuple[Row, ...]
    read: Callable[[Options], dict[str, Any]]
    write: Callable[[LanguageModel], dict[str, Any]] | None = None
    architecture: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    config: str = "config.json"
    keys: frozenset[str] = frozenset()
    weights: tuple[str, ...] = ("model.safetensors",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Say whether a configuration is of this family."""
        if self.keys:
            return self.keys <= set(config)
        return config.get("model_type") == self.name
