"""The matrix of a bidirectional mixer, entry by entry, against the kernels of its two systems."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longstate import RGLRU, S4D, Timeline
from longstate.routes import Bidirectional

LENGTH = 12


def system(seed: int) -> S4D:
    torch.manual_seed(seed)
    return S4D(1, 4, "lin", output="identity", dt_min=0.2, dt_max=0.4).double()


def matrix(mixer: torch.nn.Module, timeline: Timeline | None = None) -> np.ndarray:
    """Return what the one channel's outputs are of its inputs: M[t, s]."""
    unit = torch.eye(LENGTH, dtype=torch.float64)[:, :, None]
    when = None if timeline is None else Timeline(*(e if e is None else e.expand(LENGTH, LENGTH) for e in timeline))
    with torch.no_grad():
        return mixer(unit, None, when)[0][..., 0].numpy().T


def responses(mixer: S4D, gaps: np.ndarray) -> np.ndarray:
    """Return the causal matrix over steps with the gaps before each, from the modes alone: input s is held over the gap
    before s, then decays over those after it."""
    A, B, C, dt = (x[0].detach().numpy() for x in mixer.system())
    result = np.zeros((len(gaps), len(gaps)))
    for s, gap in enumerate(gaps):
        held = (np.exp(dt * gap * A) - 1) / A * B
        for t in range(s, len(gaps)):
            result[t, s] = 2 * (C * np.exp(dt * gaps[s + 1 : t + 1].sum() * A) * held).sum().real
    return result + mixer.D.item() * np.eye(len(gaps))


def wanted(mixer: Bidirectional, gaps: np.ndarray) -> np.ndarray:
    """Return the matrix of one sequence: entries below the diagonal from the past alone, above it from the future."""
    n = len(gaps)
    behind = np.append(gaps[1:], gaps[-1])[::-1]
    ahead, back = responses(mixer.ahead, gaps), responses(mixer.back or mixer.ahead, behind)
    result = mixer.D.item() * np.eye(n)
    for t in range(n):
        for s in range(n):
            if s < t:
                result[t, s] = ahead[t - 1, s]
            elif s > t:  # from the end, t + 1 stands at n − 2 − t, and s at n − 1 − s
                result[t, s] = back[n - 2 - t, n - 1 - s]
    return result


@pytest.mark.parametrize("shared", [False, True], ids=["two", "shared"])
@pytest.mark.parametrize("timed", [False, True], ids=["regular", "irregular"])
def test_one_sequence(shared: bool, timed: bool) -> None:
    mixer = Bidirectional(system(1), None if shared else system(2)).double()
    mixer.D.data.fill_(0.7)
    gaps = 0.3 + torch.rand(LENGTH, dtype=torch.float64) if timed else torch.ones(LENGTH, dtype=torch.float64)
    got = matrix(mixer, Timeline(dt=gaps) if timed else None)
    assert np.abs(got - wanted(mixer, gaps.numpy())).max() < 1e-12
    assert abs(got[0, 1]) > 1e-3 and abs(got[1, 0]) > 1e-3 and got[3, 3] == pytest.approx(0.7)


@pytest.mark.parametrize("idle", [[], [0, 2, 4, 5, 9, 11]], ids=["whole", "with gaps"])
def test_documents_and_gaps(idle: list[int]) -> None:
    """Two documents, perhaps with steps between and in them that do not count: a block for each, zeros elsewhere."""
    mixer = Bidirectional(system(3), system(4)).double()
    start, valid = torch.zeros(LENGTH, dtype=torch.bool), torch.ones(LENGTH, dtype=torch.bool)
    start[5] = True
    valid[idle] = False  # with gaps, the second document begins at a step that does not count
    gaps = 0.3 + torch.rand(LENGTH, dtype=torch.float64)
    got = matrix(mixer, Timeline(gaps, start, valid))
    expected = np.zeros((LENGTH, LENGTH))
    for steps in (range(5), range(5, LENGTH)):
        document = [t for t in steps if t not in idle]
        expected[np.ix_(document, document)] = wanted(mixer, gaps.numpy()[document])
    assert np.abs(got - expected).max() < 1e-12


def test_the_first_of_the_future_is_the_next_step() -> None:
    """The reverse kernel begins at u[t+1] with its first tap, not at u[t] and not at u[t+2]."""
    back = system(5)
    mixer = Bidirectional(system(6), back).double()
    first = responses(back, np.ones(1))[0, 0]
    got = matrix(mixer)
    np.testing.assert_allclose(np.diagonal(got, 1), first, rtol=1e-12)
    np.testing.assert_allclose(np.diagonal(got), mixer.D.item())


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="causal"):
        Bidirectional(Bidirectional(S4D(2, 4)))
    with pytest.raises(ValueError, match="same d_model"):
        Bidirectional(S4D(2, 4), S4D(3, 4))
    with pytest.raises(ValueError, match="RGLRU counts steps"):
        Bidirectional(RGLRU(2))(torch.randn(1, 3, 2), None, Timeline(dt=torch.ones(1, 3)))
    mixer = Bidirectional(S4D(2, 4))
    assert mixer(torch.randn(2, 0, 2))[0].shape == (2, 0, 2)
    assert mixer(torch.randn(2, 1, 2))[0].shape == (2, 1, 2)
