"""Tables of names: which tensors of theirs are which of ours, read in both directions.

A table maps their names to ours, with placeholders that stand for the same on both sides: ``{n}`` for the number of a
layer, ``{q|k|v}`` for one of several words, ``*`` for any ending. ``a + b`` joins tensors along their output axis
(several of theirs are of equal size), ``swapped(a)`` exchanges the two halves of one along it, and ``{e}``, on their
side only, runs over experts that are one tensor on ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

_PLACEHOLDER = re.compile(r"\{[^}]*\}|\*")


class Row(NamedTuple):
    """One line of a table."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    swapped: bool = False


class Part(NamedTuple):
    """One of the tensors that are joined on their side: a single one, or the same of each expert."""

    names: tuple[str, ...]
    stacked: bool


class Group(NamedTuple):
    """Tensors of theirs and of ours that hold the same numbers, on both sides joined along the output axis."""

    theirs: tuple[Part, ...]
    ours: tuple[str, ...]
    swapped: bool = False

    @property
    def names(self) -> list[str]:
        """All names on their side."""
        return [name for part in self.theirs for name in part.names]

    @property
    def plain(self) -> bool:
        """Whether one tensor is another, as it is."""
        return len(self.theirs) == len(self.ours) == 1 and not self.theirs[0].stacked and not self.swapped


class Span(NamedTuple):
    """Numbers that stand one after the other on both sides."""

    theirs: str
    their_start: int
    ours: str
    our_start: int
    length: int


def rows(table: Mapping[str, str], theirs: str = "", ours: str = "") -> tuple[Row, ...]:
    """Read a table, with what all names on either side begin with."""
    found = []
    for left, right in table.items():
        inside = re.fullmatch(r"swapped\((.*)\)", left)
        names = (inside[1] if inside else left).split(" + ")
        found.append(
            Row(tuple(theirs + x for x in names), tuple(ours + x for x in right.split(" + ")), inside is not None)
        )
    return tuple(found)


def candidates(name: str, table: Iterable[Row], shapes: Shapes, most: int) -> Iterator[Group]:
    """Give the groups that a tensor of ours belongs to, row by row.

    Args:
        name: Ours.
        table: The rows.
        shapes: Those of all of ours.
        most: Experts beyond which a row does not hold: their number comes from a file.
    """
    for row in table:
        for pattern in row.ours:
            match = _compiled(pattern).fullmatch(name)
            if not match:
                continue
            values = dict(zip(_PLACEHOLDER.findall(pattern), match.groups(), strict=True))
            ours = tuple(_filled(x, values) for x in row.ours)
            experts = shapes[name][0] if shapes[name] else 0
            if not all(x in shapes for x in ours) or (any("{e}" in x for x in row.theirs) and experts > most):
                continue
            yield Group(tuple(_part(_filled(x, values), experts) for x in row.theirs), ours, row.swapped)


def their_shapes(group: Group, shapes: Shapes) -> dict[str, list[int]]:
    """Return the shapes of theirs that go with ours.

    Raises:
        ValueError: If ours cannot be divided so.
    """
    whole = _joined(group, shapes)
    if group.plain:
        return {group.names[0]: whole}
    axis = _axis(whole)
    parts = len(group.theirs) * (2 if group.swapped else 1)
    if whole[axis] % parts:
        raise ValueError(f"{' + '.join(group.ours)}: {whole[axis]} rows do not divide into {parts} parts of equal size")
    whole[axis] //= len(group.theirs)
    return {name: whole[1:] if part.stacked else whole for part in group.theirs for name in part.names}


def spans(group: Group, shapes: Shapes) -> Iterator[Span]:
    """Give, in order, what stands where: numbers are counted from the beginning of each tensor."""
    whole = _joined(group, shapes)
    if group.plain:
        yield Span(group.names[0], 0, group.ours[0], 0, _product(whole))
        return
    axis = _axis(whole)
    rows, inner = whole[axis], _product(whole[axis + 1 :])
    theirs, half = rows // len(group.theirs), rows // 2
    bounds = {0, rows, *range(0, rows, theirs)} | ({half} if group.swapped else set())
    ends = [0]
    for name in group.ours:
        ends.append(ends[-1] + shapes[name][axis])
    cuts = sorted(bounds | set(ends))
    for outer in range(_product(whole[:axis])):
        for begin, end in pairwise(cuts):
            i = max(j for j, e in enumerate(ends[:-1]) if e <= begin)
            their_row = (begin + half) % rows if group.swapped else begin
            part = group.theirs[their_row // theirs]
            skipped = 0 if part.stacked else outer * theirs
            yield Span(
                part.names[outer if part.stacked else 0],
                (skipped + their_row % theirs) * inner,
                group.ours[i],
                (outer * (ends[i + 1] - ends[i]) + begin - ends[i]) * inner,
                (end - begin) * inner,
            )


def _joined(group: Group, shapes: Shapes) -> list[int]:
    whole = list(shapes[group.ours[0]])
    if not group.plain:
        whole[_axis(whole)] = sum(shapes[name][_axis(whole)] for name in group.ours)
    return whole


def _axis(shape: Sequence[int]) -> int:
    """Return the output axis of a weight, of the weights of several experts, or of a bias."""
    return max(0, len(shape) - 2)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _part(name: str, experts: int) -> Part:
    if "{e}" not in name:
        return Part((name,), False)
    return Part(tuple(name.replace("{e}", str(e)) for e in range(experts)), True)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    expression, end = "", 0
    for found in _PLACEHOLDER.finditer(pattern):
        inside = {"{n}": r"\d+", "*": ".+"}.get(found[0], found[0][1:-1])
        expression, end = f"{expression}{re.escape(pattern[end : found.start()])}({inside})", found.end()
    return re.compile(expression + re.escape(pattern[end:]))


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values.get(found[0], found[0]), pattern)
