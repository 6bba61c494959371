"""The recurrence with one matrix, against SciPy and over chunks of chunks."""

from __future__ import annotations

import pytest
import scipy.signal
import torch

from longstate import ops
from longstate.ops.matrix_scan.chunked import CHUNK
from ops.test_against_reference import flags, largest_error, run


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_filter_with_feedback(backend: str) -> None:
    """A companion matrix runs what SciPy runs as a filter, also from what the filter keeps."""
    feedback = torch.tensor([0.5, 0.3, -0.2], dtype=torch.float64)
    A = torch.cat([feedback[None], torch.eye(3, dtype=torch.float64)[:2]])
    u = torch.randn(2, 100, dtype=torch.float64)
    wanted, past = scipy.signal.lfilter([1.0], [1.0, *(-feedback).tolist()], u.numpy(), zi=torch.zeros(2, 3).numpy())
    b = torch.nn.functional.pad(u[..., None], (0, 2))
    h, final = ops.matrix_scan(A, b, backend=backend)
    torch.testing.assert_close(h[..., 0], torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final @ feedback, torch.from_numpy(past[:, 0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("marks", ["", "start", "start valid"])
@pytest.mark.parametrize("length", [CHUNK**2 - 1, CHUNK**2 + CHUNK + 1])
def test_chunks_of_chunks(marks: str, length: int) -> None:
    A = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]  # forgets nothing
    given = dict(A=A, b=torch.randn(2, length, 4, dtype=torch.float64), initial=torch.randn(2, 4, dtype=torch.float64))
    options = flags(marks, 2, length)
    if marks:
        options["start"] &= torch.rand(2, length) < 0.05  # most chunks have none, and hand their state on
    wanted = run(ops.matrix_scan, given, backend="reference", **options)
    assert largest_error(run(ops.matrix_scan, given, **options), wanted) < 1e-12


def test_gradients_of_gradients() -> None:
    start = torch.rand(2, CHUNK + 5) < 0.1

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.matrix_scan(*given, start=start)

    A = 0.5 * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    given = [A, torch.randn(2, CHUNK + 5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    given = [x.requires_grad_() for x in given]
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_narrow_inputs_are_summed_in_float32() -> None:
    A, b = torch.full((1, 1), 1.0), torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    h, final = ops.matrix_scan(A, b)
    assert h.dtype == torch.bfloat16 and final.dtype == torch.float32 and final.item() == 1000
