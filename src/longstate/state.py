"""What can be done with any state, whichever mixer or model it belongs to.

A state is a tensor, or a tuple (of tuples, …) of tensors, batch first; ``None`` stands for a state not asked for. It
is a value: nothing here or elsewhere changes one in place. A NamedTuple whose tensors grow along their second axis, as
the keys of full attention do, names them in its attribute ``growing``; free space at the end of them means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ._files import replacing
from ._shapes import Tensor

S = TypeVar("S")


def _map(function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Apply a function to the tensors of states of the same structure."""
    if isinstance(state, Tensor):
        return function(state, *others)
    if state is None:
        return None
    if isinstance(state, tuple):
        if any(type(o) is not type(state) or len(o) != len(state) for o in others):
            raise ValueError(
                f"states of different structure: {type(state).__name__} beside {[type(o).__name__ for o in others]}"
            )
        parts = [_map(function, *members) for members in zip(state, *others, strict=True)]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise ValueError(f"a state is made of tuples of tensors; {type(state).__name__} came")


def _named(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state with their dotted names."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif state is not None:
        for name, part in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
            yield from _named(part, f"{prefix}.{name}" if prefix else str(name))


def _growing(state: Any, grows: bool = False) -> Iterator[bool]:
    """Yield, in the order of ``_named``, whether the second axis of a tensor grows with the steps read."""
    if isinstance(state, Tensor):
        yield grows
    elif state is not None:
        for name, part in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
            yield from _growing(part, name in getattr(state, "growing", ()))


def select(state: S, index: int | slice | Sequence[int] | Tensor) -> S:
    """Return the states of the chosen sequences, in the chosen order.

    Args:
        state: A state of a batch.
        index: A number (kept as a batch of one), a slice, or a list or tensor of numbers or booleans.
    """
    if isinstance(index, int):
        index = [index]
    where = index if isinstance(index, slice) else torch.as_tensor(index)
    result: S = _map(lambda x: x[where if isinstance(where, slice) else where.to(x.device)], state)
    return result


def concatenate(states: Sequence[S]) -> S:
    """Join states along the batch, as one joins their sequences.

    Tensors that grow with the steps read are filled up with zeros to the longest.

    Raises:
        ValueError: If there is none, or their structures or shapes differ.
    """
    if not states:
        raise ValueError("concatenate([]): there is no state to join")

    growing = _growing(states[0])

    def join(*parts: Tensor) -> Tensor:
        if next(growing):
            length = max(x.shape[1] for x in parts)
            parts = tuple(torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1) for x in parts)
        if len({x.shape[1:] for x in parts}) > 1:
            raise ValueError(
                f"concatenate: tensors of shapes {[list(x.shape) for x in parts]} belong to different models"
            )
        return torch.cat(parts)

    result: S = _map(join, *states)
    return result


def where(condition: Tensor, state: S, other: S) -> S:
    """Return for each sequence its state where the condition holds, and the other where it does not.

    Args:
        condition: A boolean for each sequence ``[b]``.
        state: The states of a batch.
        other: States of the same shapes.
    """
    result: S = _map(lambda x, y: torch.where(condition.view(-1, *[1] * (x.ndim - 1)), x, y), state, other)
    return result


def detach(state: S) -> S:
    """Return the state cut off from the graph that computed it."""
    result: S = _map(Tensor.detach, state)
    return result


def to(state: S, device: torch.device | str) -> S:
    """Return the state on another device."""
    result: S = _map(lambda x: x.to(device), state)
    return result


def copy(state: S) -> S:
    """Return the same state in memory of its own."""
    result: S = _map(lambda x: x.detach().clone(memory_format=torch.contiguous_format), state)
    return result


def copy_into(state: S, memory: S) -> None:
    """Copy a state into the memory of another, where it is not there already.

    Raises:
        ValueError: If their structures or shapes differ.
    """
    places = {y.untyped_storage().data_ptr() for _, y in _named(memory)}

    def apart(x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape:
            raise ValueError(f"copy_into: a tensor of shape {list(x.shape)} came, the memory is of {list(y.shape)}")
        # What lies in memory of another tensor would be written over before it is copied.
        return x if x.data_ptr() == y.data_ptr() or x.untyped_storage().data_ptr() not in places else x.clone()

    def into(x: Tensor, y: Tensor) -> None:
        if x.data_ptr() != y.data_ptr():
            y.copy_(x)

    _map(into, _map(apart, state, memory), memory)


def growing(state: Any) -> bool:
    """Return whether a tensor of the state grows with the steps read."""
    return any(_growing(state))


def nbytes(state: Any) -> int:
    """Return the size of a state in bytes."""
    return sum(x.numel() * x.element_size() for _, x in _named(state))


def flatten(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state by their dotted names, on the CPU and ready for a file.

    Complex numbers become pairs: not every safetensors knows complex64, and none complex128.
    """
    parts = {
        name: torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        for name, x in _named(state)
    }
    return {name: x.cpu().contiguous() for name, x in parts.items()}


def unflatten(tensors: Mapping[str, Tensor], like: S) -> S:
    """Undo ``flatten``: return the state of the structure, types and device of ``like``."""
    names = iter([name for name, _ in _named(like)])

    def taken(x: Tensor) -> Tensor:
        given = tensors[next(names)].to(x.device, x.dtype.to_real() if x.is_complex() else x.dtype)
        # Files keep tensors at multiples of 8 bytes, and complex128 is read from multiples of 16: elsewhere it crashes.
        return torch.view_as_complex(given.clone()) if x.is_complex() else given

    result: S = _map(taken, like)
    return result


def save(state: Any, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a state as a safetensors file, whole or not at all.

    Args:
        state: Any state.
        path: The file to write; one that exists is replaced.
        metadata: Strings kept beside the tensors.
    """
    with replacing(path) as part:
        save_file(flatten(state), part, metadata={"format": "longstate-state", **(metadata or {})})


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings kept beside a saved state.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a saved state.
    """
    with _opened(path) as file:
        return dict(file.metadata())


def load(path: str | os.PathLike[str], like: S) -> S:
    """Read a state that ``save`` wrote.

    Args:
        path: The file.
        like: A state of the model it is for, with any batch size: ``model.initial_state(1)``.

    Returns:
        The state, with its own batch size, on the device of ``like``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds the state of another model.
    """
    with _opened(path) as file:
        expected = dict(_named(like))
        if set(file.keys()) != set(expected):
            odd = sorted(set(file.keys()) ^ set(expected))
            raise ValueError(f"{path}: the state of another model: {', '.join(odd[:3])} in one but not in the other")
        batches = set()
        for (name, x), grows in zip(expected.items(), _growing(like), strict=True):
            shape = list(file.get_slice(name).get_shape())
            wanted = [*x.shape, 2] if x.is_complex() else list(x.shape)
            fixed = 2 if grows else 1
            batches.update(shape[:1])
            if len(shape) != len(wanted) or shape[fixed:] != wanted[fixed:] or len(batches) > 1:
                raise ValueError(
                    f"{path}: the state of another model: {name} has shape {shape}, wanted {['b', *wanted[1:]]}"
                )
        return unflatten({name: file.get_tensor(name) for name in expected}, like)


def _opened(path: str | os.PathLike[str]) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such file. A state is written by longstate.state.save or `longstate generate --state-out`."
        )
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); it may be cut short") from error
    if (file.metadata() or {}).get("format") != "longstate-state":
        raise ValueError(f"{path}: a safetensors file, but not a saved state")
    return file
