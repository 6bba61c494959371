"""Tables in plain text, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns, the first row as a heading; cells that begin with a digit stand on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(cell[:1].isdigit() for cell in column[1:]) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    heading, *body = map(line, rows)
    return "\n".join([heading, "─" * max(map(len, [heading, *body])), *body])
