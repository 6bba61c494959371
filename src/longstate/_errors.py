"""One style of error message: where, what came, what was wanted, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to a misspelt one, or "" when none is near.

    With no near name the known ones are listed, so that a message ends in something to do either way.
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""


def check_choice(where: str, option: str, value: object, known: Iterable[str]) -> None:
    """Check that an option is one of the words it may be.

    Raises:
        ValueError: If it is not.
    """
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{where}({option}={value!r}): there is no such {option}.{nearest(str(value), known)}")
