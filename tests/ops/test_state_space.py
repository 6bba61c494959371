"""Dense systems against SciPy, the systems' own kernels and closed forms; long inputs, rows that end early, sharing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.signal
import torch

from longstate import ops
from longstate.ops.state_space import chunked
from longstate.systems import bilinear, legs, legt, zoh
from longstate.systems.structured import Dense
from ops.test_against_reference import largest_error
from poison import poisoned_memory

LENGTHS = (2, 3, 64, 65, 130, 1000)


def hippo(n: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return LegS at several steps, and random output vectors."""
    systems = [bilinear(*legs(n), 0.003 * 3.0**i) for i in range(channels)]
    A, B = (torch.from_numpy(np.stack(x)).to(dtype) for x in zip(*systems, strict=True))
    return [A, B, torch.randn(channels, n, dtype=torch.float64).to(dtype)]


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_what_scipy_simulates(length: int) -> None:
    A, B, C = hippo(8)
    u, initial = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    y, final = ops.state_space(u, A, B, C, initial)
    for b in range(2):
        for d in range(3):
            # SciPy's states are those before a step: its first is ours, and its outputs are read before the input.
            system = (A[d].numpy(), B[d, :, None].numpy(), C[d, None].numpy(), np.zeros((1, 1)), 1)
            padded = np.append(u[b, :, d].numpy(), 0.0)
            _, wanted, states = scipy.signal.dlsim(system, padded, x0=initial[b, d].numpy())
            np.testing.assert_allclose(y[b, :, d], wanted[1:, 0], rtol=0, atol=1e-11 * np.abs(wanted).max())
            np.testing.assert_allclose(final[b, d], states[-1], rtol=0, atol=1e-11 * np.abs(states).max())


def test_a_companion_matrix_is_a_recursive_filter() -> None:
    """In the transposed form that SciPy has: the state is its delays, after the step."""
    poles = np.array([0.9, -0.7, 0.6 + 0.5j, 0.6 - 0.5j])
    a = np.poly(poles).real
    A = np.eye(4, k=1)
    A[:, 0] -= a[1:]
    b = np.array([0.5, -1.0, 0.3, 0.8])
    u = torch.randn(1, 300, 1, dtype=torch.float64)
    # y_t = x_t[0] of x_t = A x_{t−1} + b u_t: numerator b, denominator a.
    C = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    y, _ = ops.state_space(u, torch.from_numpy(A)[None], torch.from_numpy(b)[None], C)
    np.testing.assert_allclose(y[0, :, 0], scipy.signal.lfilter(b, a, u[0, :, 0].numpy()), rtol=0, atol=1e-11)


def test_the_impulse_response_is_the_kernel_and_the_state_a_power() -> None:
    n, length = 6, 777
    A, B = zoh(*legt(n), 0.02)
    C = np.random.default_rng(0).standard_normal(n)
    u = torch.zeros(1, length, 1, dtype=torch.float64)
    u[0, 0] = 1
    given = [torch.from_numpy(x)[None] for x in (A, B, C)]
    y, final = ops.state_space(u, *given)
    kernel = Dense(A).kernel(B, C, length)
    np.testing.assert_allclose(y[0, :, 0], kernel, rtol=0, atol=1e-12 * np.abs(kernel).max())
    np.testing.assert_allclose(final[0, 0], np.linalg.matrix_power(A, length - 1) @ B, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [4, 64])
def test_float32_stays_near_float64_over_many_steps(n: int) -> None:
    """Powers are double: what is left are the roundings of inputs, matrices and sums."""
    given = hippo(n, dtype=torch.float32)
    u = torch.randn(1, 16384, 3)
    y, final = ops.state_space(u, *given)
    exact = ops.state_space(u.double(), *(x.double() for x in given))
    assert y.dtype == final.dtype == torch.float32
    assert largest_error([y.double(), final.double()], list(exact)) < 1e-6


def test_one_matrix_for_all_is_the_same_as_copies() -> None:
    A, B, C = hippo(5)
    u = torch.randn(2, 150, 3, dtype=torch.float64)
    shared = A[:1].clone().requires_grad_()
    copies = A[:1].expand(3, -1, -1).clone().requires_grad_()
    (y, final), (y_copies, final_copies) = (ops.state_space(u, x, B, C) for x in (shared, copies))
    assert largest_error([y, final], [y_copies, final_copies]) < 1e-12
    (one,) = torch.autograd.grad(y.sin().sum() + final.sum(), shared)
    (all_,) = torch.autograd.grad(y_copies.sin().sum() + final_copies.sum(), copies)
    assert largest_error([one], [all_.sum(0, keepdim=True)]) < 1e-11


def test_sequences_in_one_row_are_as_if_alone() -> None:
    """Over many chunks, in systems that hardly forget: at every height of the tree a state must stop."""
    cuts = [0, 70, 330, 331, 900, 1000]
    _, B, C = hippo(4)
    A = 0.999 * torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64))[0]
    u = torch.randn(1, cuts[-1], 3, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(1, cuts[-1], dtype=torch.bool)
    start[0, cuts[1:-1]] = True
    y, final = ops.state_space(u, A, B, C, start=start)
    parts = [ops.state_space(u[:, a:b], A, B, C) for a, b in pairwise(cuts)]
    alone = torch.cat([part for part, _ in parts], 1)
    assert largest_error([y, final], [alone, parts[-1][1]]) < 1e-10
    gradients = [torch.autograd.grad(x.sin().sum() + f.sum(), u)[0] for x, f in ((y, final), (alone, parts[-1][1]))]
    assert largest_error(gradients[:1], gradients[1:]) < 1e-10


@pytest.mark.parametrize("flags", ["", "start", "valid", "start valid"])
def test_gradients_are_those_measured(flags: str) -> None:
    """Over two chunks and a part: every factor of the powers, the tree, the taps and the last state."""
    length = 2 * chunked.CHUNK + 3
    A, B, C = hippo(2, 2)
    start = torch.rand(2, length) < 0.04 if "start" in flags else None
    valid = torch.rand(2, length) < 0.7 if "valid" in flags else None
    given = [torch.randn(2, length, 2, dtype=torch.float64), A, B, C, torch.randn(2, 2, 2, dtype=torch.float64)]
    given = [x.clone().requires_grad_() for x in given]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.state_space(*given, start=start, valid=valid)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


def test_rows_that_end_early_or_never_begin() -> None:
    """A row of no steps keeps its state, unless a sequence begins there; its neighbour runs to the end of a chunk."""
    A, B, C = hippo(3)
    u, initial = torch.randn(3, 2 * chunked.CHUNK, 3), torch.randn(3, 3, 3, dtype=torch.float64)
    valid, start = torch.ones(3, u.shape[1], dtype=torch.bool), torch.zeros(3, u.shape[1], dtype=torch.bool)
    valid[1:], start[2, 40] = False, True
    y, final = ops.state_space(u.double(), A, B, C, initial, start=start, valid=valid)
    assert torch.equal(final[1], initial[1]) and not final[2].any() and not y[1:].any()
    alone = ops.state_space(u[:1].double(), A, B, C, initial[:1])
    assert largest_error([y[:1], final[:1]], list(alone)) < 1e-12


def test_nothing_is_read_before_it_is_written() -> None:
    given = [x.requires_grad_() for x in (torch.randn(2, 200, 3, dtype=torch.float64), *hippo(4))]
    start = torch.rand(2, 200) < 0.05
    with poisoned_memory():
        y, final = ops.state_space(*given, start=start, valid=torch.rand(2, 200) < 0.8)
        gradients = torch.autograd.grad(y.sum() + final.sum(), given)
    assert all(x.isfinite().all() for x in (y, final, *gradients))


@pytest.mark.compiled
def test_any_length_in_one_exported_graph() -> None:
    A, B, C = hippo(4)

    class Module(torch.nn.Module):
        def forward(self, u: torch.Tensor, start: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return ops.state_space(u, A, B, C, start=start, valid=valid)

    def example(length: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(2, length, 3).double(), torch.rand(2, length) < 0.1, torch.rand(2, length) < 0.8

    sizes = {1: torch.export.Dim("length")}
    program = torch.export.export(Module(), example(11), dynamic_shapes=(sizes, sizes, sizes)).module()
    for length in (1, 2, 64, 200):
        given = example(length)
        assert largest_error(list(program(*given)), list(Module()(*given))) < 1e-12


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
def test_sizes_that_do_not_go_together() -> None:
    u, A, B = torch.zeros(1, 5, 3), torch.zeros(3, 4, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"state_space: A has shape \[2, 4, 4\], wanted \[3, 4, 4\] or \[1, 4, 4\]"):
        ops.state_space(u, A[:2], B, B)
    with pytest.raises(ValueError, match="state_space: C has shape"):
        ops.state_space(u, A, B, B[:2])
