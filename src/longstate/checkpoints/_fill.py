"""From files into a model and back: which tensors go where is settled before anything is allocated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..mixers import Mixer
from ..models import LanguageModel
from ._entry import DTYPES
from ._rows import Group, Row, Shapes, candidates, spans, their_shapes
from ._tensors import Reader, few

HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


def fill(
    model: LanguageModel,
    reader: Reader,
    table: Sequence[Row],
    ignored: Sequence[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put the tensors of files in the place of a model's, which are on the meta device.

    Nothing is allocated before names, shapes and types have been compared. A tensor that stays as it is remains in its
    file, mapped into memory; any other is copied piece by piece to where it stays. So memory never holds more than the
    model.

    Args:
        model: The model.
        reader: The files.
        table: Their names and ours.
        ignored: Expressions for names of theirs that may be left over.
        device: Where to; the CPU when absent.
        dtype: The type of the parameters; that of the files when absent.

    Raises:
        ValueError: If the files are not of such a model.
    """
    shapes = tensors_of(model)
    groups = _matched(model, reader, table, ignored, shapes)
    common = _common_type(reader, groups)
    order = {name: i for i, name in enumerate(reader.entries)}
    groups.sort(key=lambda group: order[group.names[0]])
    device = torch.device(device or "cpu")
    for group in groups:
        found = DTYPES[reader.entries[group.names[0]].dtype]
        kinds = {name: _type(model, name, found, common, dtype) for name in group.ours}
        if group.plain and device.type == "cpu" and kinds[group.ours[0]] == found:
            _assign(model, group.ours[0], reader.mapped(group.names[0]))
            continue
        targets = {name: torch.empty(shapes[name], dtype=kind, device=device) for name, kind in kinds.items()}
        for span in spans(group, shapes):
            flat = targets[span.ours].view(-1)
            reader.read(span.theirs, span.their_start, flat[span.our_start : span.our_start + span.length])
        for name, x in targets.items():
            _assign(model, name, x)
    model._tie()


def gather(model: LanguageModel, table: Sequence[Row]) -> dict[str, Tensor]:
    """Return a model's tensors under their names; those that only have another name are the model's own.

    Raises:
        ValueError: If the table has no place for one.
    """
    state = dict(model.state_dict())
    shapes = tensors_of(model)
    found: dict[str, Tensor] = {}
    for name in shapes:
        group = next(candidates(name, table, shapes, 2**31), None)
        if group is None:
            raise ValueError(f"{name}: this family has no such tensor")
        if name != group.ours[0]:
            continue
        if group.plain:
            found[group.names[0]] = state[name].contiguous()
            continue
        for theirs, shape in their_shapes(group, shapes).items():
            found[theirs] = state[name].new_empty(shape)
        for span in spans(group, shapes):
            flat = found[span.theirs].view(-1)
            piece = state[span.ours].reshape(-1)[span.our_start : span.our_start + span.length]
            flat[span.their_start : span.their_start + span.length] = piece
    return found


def tensors_of(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a model's parameters and buffers, without the head where it is the embedding."""
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    if isinstance(model, LanguageModel) and model.config["tie_embeddings"]:
        shapes.pop(HEAD)
    return shapes


def _matched(
    model: LanguageModel, reader: Reader, table: Sequence[Row], ignored: Sequence[str], shapes: Shapes
) -> list[Group]:
    """Choose a row for each tensor of ours, and account for every one of theirs."""
    entries, where = reader.entries, reader.where
    groups, missing, done = [], set(), set[str]()
    for name in shapes:
        if name in done:
            continue
        choice = list(candidates(name, table, shapes, len(entries)))
        group = next((group for group in choice if all(x in entries for x in group.names)), None)
        if group is None:
            missing |= {x for x in choice[0].names if x not in entries} if choice else {name}
        else:
            groups.append(group)
            done |= set(group.ours)
    _refuse(where, "missing", missing)
    used = [name for group in groups for name in group.names]
    left = {x for x in set(entries) - set(used) if not any(re.fullmatch(pattern, x) for pattern in ignored)}
    head = _their_head(model, table, shapes, left)
    _refuse(where, "not part of the model", left - {head})
    for group in groups:
        for name, shape in their_shapes(group, shapes).items():
            if entries[name].shape != shape:
                raise ValueError(
                    f"{where}: {name} has shape {entries[name].shape}, but the configuration wants {shape}"
                )
    for name in [*used, *([head] if head else [])]:
        if entries[name].dtype not in DTYPES:
            raise ValueError(
                f"{where}: {name} holds numbers of type {entries[name].dtype:.40}, wanted one of {', '.join(DTYPES)}"
            )
    if head:
        embedding = next(group for group in groups if group.ours == (EMBEDDING,)).names[0]
        _check_equal(reader, head, embedding)
    return groups


def _refuse(where: object, title: str, names: set[str]) -> None:
    if names:
        raise ValueError(f"{where}: {len(names)} tensors {title}: {few(names)}. The configuration is of another model.")


def _their_head(model: LanguageModel, table: Sequence[Row], shapes: Shapes, left: set[str]) -> str | None:
    """Return the name of a head that is there although it is the embedding."""
    if not model.config["tie_embeddings"]:
        return None
    with_head = {**shapes, HEAD: shapes[EMBEDDING]}
    names = (group.names[0] for group in candidates(HEAD, table, with_head, 0))
    return next((name for name in names if name in left), None)


def _check_equal(reader: Reader, head: str, embedding: str) -> None:
    """Check that a head which is said to be the embedding is."""
    one, other = reader.entries[head], reader.entries[embedding]
    same = one.shape == other.shape
    same = same and torch.equal(reader.mapped(head), reader.mapped(embedding).to(DTYPES[one.dtype]))
    if not same:
        raise ValueError(
            f"{reader.where}: the configuration says that {head} is the embedding, but {embedding} is another. Set the "
            f"option that ties them to false."
        )


def _common_type(reader: Reader, groups: Sequence[Group]) -> torch.dtype:
    """Return the type that most numbers have."""
    counts: Counter[str] = Counter()
    for group in groups:
        for name in group.names:
            counts[reader.entries[name].dtype] += torch.Size(reader.entries[name].shape).numel()
    return DTYPES[counts.most_common(1)[0][0]] if counts else torch.float32


def _type(
    model: LanguageModel, name: str, found: torch.dtype, common: torch.dtype, wanted: torch.dtype | None
) -> torch.dtype:
    """Choose the type of a tensor.

    Where a file mixes types, what meets activations has one type; what a mixer takes to float32 itself (decays, skips,
    biases of steps) keeps its own.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        return module._buffers[leaf].dtype  # type: ignore[union-attr]
    if wanted is not None:
        return wanted
    return found if isinstance(module, Mixer) else common


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter, with its marks, or of a buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    if leaf in module._buffers:
        setattr(module, leaf, tensor)
        return
    new = nn.Parameter(tensor)
    new.__dict__.update(old.__dict__)
    setattr(module, leaf, new)
