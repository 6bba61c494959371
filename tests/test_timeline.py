"""Timelines: what they take, how they are cut, and the reordering that skips steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longstate import Timeline
from longstate.timeline import Compaction, segments, zero_where_invalid


def test_expand_broadcasts_each_entry() -> None:
    dt = torch.rand(3, 1)
    whole = Timeline(dt, torch.tensor(True), torch.ones(5, dtype=torch.bool)).expand(3, 5)
    assert [tuple(x.shape) for x in whole] == [(3, 5)] * 3
    assert torch.equal(whole.dt, dt.expand(3, 5))
    assert Timeline().expand(2, 2) == Timeline()


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (Timeline(dt=torch.ones(2, 4)), "dt"),
        (Timeline(start=torch.ones(5, dtype=torch.bool)), "start"),
        (Timeline(valid=torch.ones(2, 3, 1, dtype=torch.bool)), "valid"),
        (Timeline(dt=torch.ones(2, 3, dtype=torch.int64)), "float"),
        (Timeline(start=torch.ones(2, 3)), "bool"),
        (Timeline(valid=torch.ones(2, 3, dtype=torch.int32)), "bool"),
    ],
)
def test_what_does_not_fit_is_named(when: Timeline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        when.expand(2, 3)


def test_slices_cut_along_time_alone() -> None:
    when = Timeline(torch.rand(2, 6), torch.rand(6) < 0.5, torch.ones(2, 1, dtype=torch.bool))
    cut = when.slice(2, 5)
    assert torch.equal(cut.dt, when.dt[:, 2:5]) and torch.equal(cut.start, when.start[2:5])
    assert torch.equal(cut.valid, when.valid)
    assert Timeline(dt=torch.tensor(2.0)).slice(0, 1).dt == 2


def test_segments_count_starts() -> None:
    start = torch.tensor([[False, True, False, True], [True, False, False, False]])
    assert segments(start).tolist() == [[0, 1, 1, 2], [1, 1, 1, 1]]


def test_zeros_whatever_stood_there() -> None:
    x = torch.full((1, 2, 3), torch.nan)
    x[:, 1] = 2
    assert zero_where_invalid(x, torch.tensor([[False, True]])).tolist() == [[[0, 0, 0], [2, 2, 2]]]
    assert zero_where_invalid(x, None) is x


rows = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=0, max_size=9)


@settings(deadline=None, derandomize=True)
@given(rows)
def test_compaction_by_hand(row: list[tuple[bool, bool]]) -> None:
    """The steps that count come first, in order, each in its sequence; and back."""
    valid = torch.tensor([[v for v, _ in row]], dtype=torch.bool).view(1, -1)
    start = torch.tensor([[s for _, s in row]], dtype=torch.bool).view(1, -1)
    compaction = Compaction.of(valid)
    x = torch.arange(1.0, len(row) + 1).view(1, -1, 1)
    kept = [i + 1 for i, (v, _) in enumerate(row) if v]
    compact = compaction.compact(x)
    assert compact[0, : len(kept), 0].tolist() == kept
    assert sorted(compact[0, :, 0].tolist()) == x[0, :, 0].tolist()
    assert compaction.restore(compact)[0, :, 0].tolist() == [i + 1 if v else 0 for i, (v, _) in enumerate(row)]
    # Two steps that count are of one sequence just when no start stood between them, on whatever step.
    given_segment, number = [], 0
    for _, began in row:
        number += began
        given_segment.append(number)
    moved = segments(compaction.start(start))[0].tolist()
    # The last of the padding stands for what comes after the row.
    wanted = [0, *(given_segment[i - 1] for i in kept), *([number] if len(kept) < len(row) else [])]
    got = [0, *moved[: len(kept)], *moved[-1:][: len(row) - len(kept)]]
    assert [a != b for a, b in itertools.pairwise(got)] == [a != b for a, b in itertools.pairwise(wanted)]
