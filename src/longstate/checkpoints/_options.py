"""The options of published configurations, each checked when it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
# Their words for activations, and ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


class Options:
    """The entries of a published configuration, each checked for its kind when it is taken.

    Args:
        where: The file, for messages.
        entries: What it holds.
        tensors: How many tensors the weights have: a model has not more layers.
    """

    def __init__(self, where: str, entries: Mapping[str, Any], tensors: int) -> None:
        self.where, self.entries, self.tensors = where, entries, tensors

    def take(self, name: str, default: T) -> T:
        """Return an entry of the same kind as its default; the default when it is absent.

        Raises:
            ValueError: If it is of another kind.
        """
        value = self.entries.get(name, default)
        return default if value is default else self._checked(name, value, type(default))

    def need(self, name: str, kind: type[T]) -> T:
        """Return an entry that must be there."""
        if name not in self.entries:
            raise ValueError(f"{self.where}: {name} is missing")
        return self._checked(name, self.entries[name], kind)

    def maybe(self, name: str, kind: type[T]) -> T | None:
        """Return an entry; None when it is absent or null."""
        value = self.entries.get(name)
        return None if value is None else self._checked(name, value, kind)

    def first(self, names: Sequence[str], default: T) -> T:
        """Return the entry by the first of several names that is there."""
        name = next((name for name in names if self.entries.get(name) is not None), names[0])
        return self.take(name, default)

    def only(self, name: str, *wanted: Any) -> None:
        """Check that an entry, if it is there, has a value that the family's other models have too.

        Raises:
            ValueError: If it has not: then the model is not one that we compute.
        """
        value = self.entries.get(name, wanted[0])
        if not any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in wanted):
            raise ValueError(
                f"{self.where}: {name} is {value!r:.100}; models with other than {_alternatives(wanted)} are not known"
            )

    def words(self, name: str, known: Mapping[str, T]) -> list[T] | None:
        """Return a list of words, translated; None when it is absent or null."""
        value = self.maybe(name, list)
        if value is None:
            return None
        self.bounded(name, len(value))
        for word in value:
            if not isinstance(word, str) or word not in known:
                raise ValueError(f"{self.where}: {name} has {word!r:.100}; known: {', '.join(known)}")
        return [known[word] for word in value]

    def numbers(self, name: str, default: Sequence[float]) -> list[float]:
        """Return a list of numbers; the default when it is absent or null."""
        value = self.entries.get(name)
        value = default if value is None else value
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.where}: {name} is {value!r:.100}, wanted a list of numbers")
        return [self._checked(name, x, float) for x in value]

    def indices(self, name: str) -> set[int]:
        """Return a list of numbers of layers as a set; empty when absent or null."""
        return {self._checked(name, x, int) for x in self.maybe(name, list) or []}

    def layers(self, name: str, default: int) -> int:
        """Return the number of layers."""
        return self.bounded(name, self.take(name, default))

    def bounded(self, name: str, count: int) -> int:
        """Check a number of layers against what the weights could be: each layer has a tensor at least."""
        if not 0 <= count <= self.tensors:
            raise ValueError(f"{self.where}: {name} says {count} layers, but the weights have {self.tensors} tensors")
        return count

    def activation(self, name: str, default: str) -> str:
        """Return our word for an activation."""
        word = self.take(name, default)
        if word not in ACTIVATIONS:
            raise ValueError(f"{self.where}: {name} is {word!r:.100}; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[word]

    def rotary_base(self, default: float = 10000.0) -> float:
        """Return the base of rotary positions, from wherever it stands.

        Raises:
            ValueError: If positions are scaled in a way of their own.
        """
        merged: dict[str, Any] = {"rope_theta": self.entries.get("rope_theta", default)}
        for name in ("rope_parameters", "rope_scaling"):
            merged |= self.maybe(name, dict) or {}
        inner = Options(f"{self.where}: rotary positions", merged, 0)
        inner.only("rope_type", "default", None)
        inner.only("type", "default", None)
        return inner.need("rope_theta", float)

    def rotary_factor(self, default: float) -> float:
        """Return the part of a head that is rotated, from wherever it stands."""
        inner = self.maybe("rope_parameters", dict) or {}
        found = {"partial_rotary_factor": self.entries.get("partial_rotary_factor", default), **inner}
        return Options(self.where, found, 0).need("partial_rotary_factor", float)

    def _checked(self, name: str, value: Any, kind: type[T]) -> T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {name} is {value!r:.100}, wanted {_KINDS.get(kind, kind.__name__)}")
        return value


_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list: "a list",
    dict: "an object",
}


def _alternatives(values: Sequence[Any]) -> str:
    return " or ".join(repr(value) for value in values)
