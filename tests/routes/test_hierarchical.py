"""Two scales of time against the two mixers run by hand, chunk by chunk and sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longstate import LRU, S4D, S5, Hyena, Timeline
from longstate.routes import Bidirectional, HiSS


def build(chunk: int, output: str = "sum") -> HiSS:
    torch.manual_seed(2)
    options: dict[str, Any] = {"output": "identity", "dt_min": 0.1, "dt_max": 0.5}
    return HiSS(S4D(3, 4, "lin", **options), S5(3, 4, **options), chunk, output).double()


def by_hand(mixer: HiSS, x: Tensor, dt: Tensor | None) -> Tensor:
    """Return the outputs of one sequence ``[t d]``: each chunk by itself, then the chunks' ends, then both together."""
    c = mixer.chunk
    chunks = x.split(c)
    gaps = [None] * len(chunks) if dt is None else dt.split(c)
    low = []
    for piece, gap in zip(chunks, gaps, strict=True):
        low.append(mixer.lower(piece[None], None, None if gap is None else Timeline(gap))[0][0])
    whole = [i for i, p in enumerate(chunks) if len(p) == c]
    high = torch.zeros(1, x.shape[1], dtype=x.dtype)
    if whole:
        ends = torch.stack([low[i][-1] for i in whole])[None]
        lasted = None if dt is None else Timeline(torch.stack([gaps[i].sum() / c for i in whole]))
        high = torch.cat([high, mixer.higher(ends, None, lasted)[0][0]])
    held = high[torch.arange(1, len(x) + 1) // c]
    return held if mixer.output == "held" else torch.cat(low) + held


@pytest.mark.parametrize("output", ["sum", "held"])
@pytest.mark.parametrize("timed", [False, True], ids=["regular", "irregular"])
@pytest.mark.parametrize(("chunk", "length"), [(1, 7), (4, 3), (4, 12), (5, 33)])
def test_one_sequence(chunk: int, length: int, timed: bool, output: str) -> None:
    mixer = build(chunk, output)
    x = torch.randn(1, length, 3, dtype=torch.float64)
    dt = 0.3 + torch.rand(length, dtype=torch.float64) if timed else None
    with torch.no_grad():
        got = mixer(x, None, None if dt is None else Timeline(dt))[0]
        assert (got[0] - by_hand(mixer, x[0], dt)).abs().max() < 1e-12


@pytest.mark.parametrize("timed", [False, True], ids=["regular", "irregular"])
def test_rows_of_documents_with_gaps_in_pieces(timed: bool) -> None:
    """Sequences that begin anywhere, also after the last chunk's end, and at steps that do not count."""
    mixer, batch, length = build(3), 6, 40
    x = torch.randn(batch, length, 3, dtype=torch.float64)
    dt = 0.3 + torch.rand(batch, length, dtype=torch.float64) if timed else None
    start, valid = torch.rand(batch, length) < 0.15, torch.rand(batch, length) < 0.7
    start[1], valid[2], start[3, -1], valid[3, -1] = False, True, True, False
    wanted = torch.zeros_like(x)
    with torch.no_grad():
        for b in range(batch):
            document = start[b].cumsum(0)
            for i in range(int(document[-1]) + 1):
                steps = (document == i) & valid[b]
                if steps.any():
                    wanted[b, steps] = by_hand(mixer, x[b, steps], None if dt is None else dt[b, steps])
        when = Timeline(dt, start, valid)
        assert (mixer(x, None, when)[0] - wanted).abs().max() < 1e-12
        for size in (1, 2, 7, 19):
            state, outputs = None, []
            for at in range(0, length, size):
                y, state = mixer(x[:, at : at + size], state, when.slice(at, at + size))
                outputs.append(y)
            assert (torch.cat(outputs, 1) - wanted).abs().max() < 1e-12


def test_the_slower_mixer_sees_no_more_steps_than_there_are_chunks() -> None:
    mixer, seen = build(8), []
    mixer.higher.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    mixer(torch.randn(2, 800, 3, dtype=torch.float64))
    assert seen == [101]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        HiSS(S4D(2, 4), S4D(2, 4), 0)
    with pytest.raises(ValueError, match="same d_model"):
        HiSS(S4D(2, 4), S4D(3, 4), 4)
    for mixer in (Bidirectional(S4D(2, 4)), Hyena(2, 10)):
        with pytest.raises(ValueError, match="causal mixer with a state"):
            HiSS(S4D(2, 4), mixer, 4)
    with pytest.raises(ValueError, match="LRU counts steps"):
        HiSS(LRU(2), S4D(2, 4), 4)(torch.randn(1, 3, 2), None, Timeline(dt=torch.ones(1, 3)))
