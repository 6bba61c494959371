"""Programs of kernels: what runs in them, and what is refused before anything runs."""

from __future__ import annotations

import pytest
import torch

from longstate import native

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)
kernels = native.kernels


def exp(x: object, y: object, count: int) -> tuple[object, ...]:
    return 0, x, y, count


def test_numbers_that_each_run_is_given() -> None:
    """Two programs in one run, the second through room that the run has itself."""
    once, twice = kernels.Program(0), kernels.Program(4 * 5)
    once.add("elementwise", *exp((1, 0), (2, 4), 4))
    twice.add("elementwise", *exp((2, 0), (0, 0), 5))
    twice.add("elementwise", *exp((0, 0), (1, 0), 5))
    x, y, z = torch.randn(4), torch.full((5,), -1.0), torch.empty(5)
    for threads in (1, 2):
        kernels.run(threads, once, x.data_ptr(), y.data_ptr(), twice, z.data_ptr(), y.data_ptr())
        torch.testing.assert_close(y[1:], x.exp())
        assert y[0] == -1
        torch.testing.assert_close(z, y.exp().exp())
        y.fill_(-1), z.fill_(0)


def test_what_is_refused() -> None:
    program = kernels.Program(0)
    with pytest.raises(ValueError, match="no kernel exponential"):
        program.add("exponential", 0)
    with pytest.raises(TypeError, match="elementwise: 3 numbers came, wanted 4"):
        program.add("elementwise", 0, 0, 0)
    program.add("elementwise", *exp((1, 0), (2, 0), 4))
    with pytest.raises(TypeError, match="run: 1 addresses came, wanted 2"):
        kernels.run(1, program, 0)
    with pytest.raises(TypeError, match="integer"):
        kernels.run(1, program, "0", 0)
