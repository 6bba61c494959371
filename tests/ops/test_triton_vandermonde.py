"""Vandermonde's GPU kernels in Triton's interpreter: as exact as their formula in float64, rounded once."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from ops.test_against_reference import largest_error
from ops.test_vandermonde import arguments, gradients, plain
from poison import poisoned_memory

pytestmark = pytest.mark.interpreted
if not _triton.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize(("rows", "states"), [((), 1), ((3,), 5), ((2, 2), 8), ((0,), 2), ((2,), 0)], ids=str)
def test_the_plain_sum(rows: tuple[int, ...], states: int, kind: str) -> None:
    """All is in float64 but what is rounded to float32 at the end: kernel and weights' gradient to 2⁻²⁴."""
    for length in (0, 1, 33, 90):
        w, z = arguments(kind, rows, states)
        g = torch.randn(*rows, length)
        with poisoned_memory():
            got = gradients(ops.vandermonde, [w, z], g, backend="triton")
        wanted = gradients(plain, [w, z], g)
        assert [x.dtype for x in got] == [torch.float32, w.dtype, z.dtype]
        assert largest_error([x.to(y.dtype) for x, y in zip(got, wanted, strict=True)], wanted) < 2**-23
        assert largest_error(got[2:], wanted[2:]) < 1e-12


def test_more_states_than_a_program_takes() -> None:
    """A tap is rounded once for each 64 states."""
    w, z = arguments("complex", (2,), 70)
    got, wanted = (
        gradients(f, [w, z], torch.ones(2, 40), **o) for f, o in ((ops.vandermonde, {"backend": "triton"}), (plain, {}))
    )
    assert largest_error([x.to(y.dtype) for x, y in zip(got, wanted, strict=True)], wanted) < 2**-22
    assert largest_error(got[2:], wanted[2:]) < 1e-12


def test_fifty_digits() -> None:
    """With tiles as on GPUs, of 65,536 taps: a power is a product of at most 16 + 8 others, each good to a few
    roundings, of bases whose arguments are rounded once: far below (1000 + |l z|) 2⁻⁵³ of its term."""
    length = 65_536
    w, z = arguments("complex", (1,), 16)
    z[0, :4] = torch.complex(torch.zeros(4).double(), torch.tensor([0.0, 1e-9, torch.pi, 1.0]).double())
    from longstate.ops.vandermonde import triton

    with triton.FORWARD.force({}):
        kernel = ops.vandermonde(w, z, length, backend="triton")
    with mpmath.workdps(50):
        for step in [0, 1, 2, 31, 32, 1023, 1024, 8191, 8192, 12_345, 16_383, 65_535]:
            powers = [mpmath.exp(step * mpmath.mpc(b)) for b in z[0].tolist()]
            terms = [2 * mpmath.mpc(a) * p for a, p in zip(w[0].tolist(), powers, strict=True)]
            exact, size = mpmath.fsum(terms).real, float(mpmath.fsum(abs(x) for x in terms))
            error = float(abs(mpmath.mpf(kernel[0, step].item()) - exact))
            bound = size * (1000 + 64 + step * z.abs().max().item()) * 2**-53
            assert bound < 1e-9 * size
            assert error <= bound + 2**-24 * float(abs(exact)), step


def test_gradients_in_tiles_as_on_gpus() -> None:
    from longstate.ops.vandermonde import triton

    w, z = arguments("complex", (2,), 5)
    g = torch.randn(2, 20_000)
    with triton.FORWARD.force({}), triton.BACKWARD.force({}):
        got = gradients(ops.vandermonde, [w, z], g, backend="triton")
    wanted = gradients(plain, [w, z], g)
    assert largest_error([x.to(y.dtype) for x, y in zip(got, wanted, strict=True)], wanted) < 2**-23
    assert largest_error(got[2:], wanted[2:]) < 1e-10


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_broadcasting_strides_and_the_same_numbers_twice(kind: str) -> None:
    w, z = arguments(kind, (3, 2), 6)
    g = torch.randn(3, 2, 40)
    wanted = gradients(ops.vandermonde, [w, z[:1].expand(3, 2, 6)], g, backend="triton")
    got = gradients(ops.vandermonde, [w, z[0]], g, backend="triton")
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[2], wanted[2].sum(0), rtol=1e-12, atol=1e-12)
    strided = [w.mT.contiguous().mT, z[0].conj().clone().conj()]
    again = gradients(ops.vandermonde, strided, g.mT.contiguous().mT, backend="triton")
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    torch.testing.assert_close(got[2], again[2], rtol=1e-14, atol=1e-14)  # torch's last product has no one order


def test_what_dies_out_and_what_grows() -> None:
    """Down to zero without noise, and up to the infinity of float32; gradients of what grew are finite where it was."""
    w = torch.ones(1, 1)
    for rate in (-1.0, -20.0, -800.0, 0.0, 0.5):
        z = torch.full((1, 1), rate).double()
        kernel = ops.vandermonde(w, z, 1000, backend="triton")
        wanted = torch.exp(rate * torch.arange(1000, dtype=torch.float64)).float()
        torch.testing.assert_close(kernel[0], wanted, rtol=2**-23, atol=1e-45)
        assert (rate < 0.5) == kernel.isfinite().all().item()
    z = torch.full((1, 1), complex(70.0, 1.0), dtype=torch.complex128)
    from longstate.ops.vandermonde import triton

    for tiles in (triton.BACKWARD.interpreter, {}):  # and as on GPUs, where a tile is far longer than the kernel
        with triton.BACKWARD.force(tiles):
            found = gradients(ops.vandermonde, [w.to(torch.complex64), z], torch.ones(1, 2), backend="triton")
        assert all(x.isfinite().all() for x in found)


def test_other_types_have_other_backends() -> None:
    w, z = arguments("complex", (2,), 3, torch.float64)
    with pytest.raises(ValueError, match=r"float32.*Use"):
        ops.vandermonde(w, z, 5, backend="triton")
    for kind, backend in itertools.product(["real", "complex"], ["triton", "chunked"]):
        w, z = arguments(kind, (2,), 3)
        assert ops.vandermonde(w.bfloat16() if kind == "real" else w, z, 5, backend=backend).dtype == torch.float32
