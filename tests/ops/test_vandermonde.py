"""Kernels of diagonal systems: against 50 digits, against the plain sum, their gradients, and how they are called."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import pytest
import torch

from longstate import native, ops
from longstate.ops.vandermonde import chunked
from ops.test_against_reference import largest_error
from ops.test_calls import Watch
from ops.threads import check_threads

BACKENDS = [name for name, what in ops.backends()["vandermonde"].items() if what in ("in use", "on request")]
FAST = [name for name in BACKENDS if name != "reference"]
LENGTHS = (0, 1, 2, 63, 64, 65, 257, 300)
LONG = 65_536


def arguments(kind: str, rows: tuple[int, ...], states: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return weights and bases: modes that last, or die out at once, at frequencies up to several turns a step."""
    torch.manual_seed(states)
    z = -0.05 * torch.rand(*rows, states, dtype=torch.float64) ** 4
    w = torch.randn(*rows, states, dtype=dtype.to_complex() if kind == "complex" else dtype)
    return [w, torch.complex(z, 9 * torch.randn_like(z)) if kind == "complex" else z]


def plain(w: torch.Tensor, z: torch.Tensor, length: int) -> torch.Tensor:
    """Return the sum as it is written, in float64; differentiable."""
    terms = w[..., None] * torch.exp(z[..., None] * torch.arange(length, dtype=torch.float64))
    return 2 * terms.sum(-2).real if terms.is_complex() else terms.sum(-2)


def gradients(function: Any, tensors: list[torch.Tensor], g: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    kernel = function(*leaves, g.shape[-1], **options)
    total = (kernel * g).sum() + sum(0 * x.real.sum() for x in leaves)  # of no taps, the reference has no gradient
    return [kernel.detach(), *torch.autograd.grad(total, leaves)]


def check_fifty_digits(backend: str, dtype: torch.dtype) -> None:
    """A float32 result is the exact one, rounded; in float64 the error is that of the powers.

    A power is a product of at most 135 others, each good to a few roundings, of bases whose arguments are rounded
    once: (1000 + |lz|) 2⁻⁵³ of its term, and the sum of 2n terms 2n roundings more.
    """
    w, z = arguments("complex", (2,), 32, dtype)
    z[0, :4] = torch.complex(torch.zeros(4).double(), torch.tensor([0.0, 1e-9, torch.pi, 1.0]).double())
    kernel = ops.vandermonde(w, z, LONG, backend=backend)
    assert kernel.dtype == dtype
    with mpmath.workdps(50):
        for row, step in itertools.product(range(2), [0, 1, 2, 63, 64, 255, 256, 8191, 8192, 12_345, 16_383, 65_535]):
            terms = [
                2 * mpmath.mpc(a) * mpmath.exp(step * mpmath.mpc(b))
                for a, b in zip(w[row].tolist(), z[row].tolist(), strict=True)
            ]
            exact, size = mpmath.fsum(terms).real, float(mpmath.fsum(abs(x) for x in terms))
            error = float(abs(mpmath.mpf(kernel[row, step].item()) - exact))
            bound = size * (1000 + 64 + step * z[row].abs().max().item()) * 2**-53
            assert bound < 1e-9 * size
            assert error <= bound + (2**-24 * float(abs(exact)) if dtype == torch.float32 else 0), (row, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_digits(dtype: torch.dtype) -> None:
    check_fifty_digits("chunked", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_digits_of_every_instruction_set(dtype: torch.dtype, instructions: str) -> None:
    check_fifty_digits("cpu", dtype)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "states"), [((), 1), ((3,), 5), ((2, 3), 8), ((0,), 2), ((2,), 0)], ids=str)
def test_the_plain_sum(rows: tuple[int, ...], states: int, backend: str, kind: str) -> None:
    """Also gradients; in float64, where every sum is of at most a few hundred terms of order 1 (times l)."""
    for length in LENGTHS:
        w, z = arguments(kind, rows, states, torch.float64)
        g = torch.randn(*rows, length, dtype=torch.float64)
        got, wanted = (gradients(f, [w, z], g, **o) for f, o in ((ops.vandermonde, {"backend": backend}), (plain, {})))
        assert largest_error(got, wanted) < 1e-12


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_every_instruction_set(kind: str, instructions: str) -> None:
    """In more than one piece of 8192 steps. Gradients of 20,000 steps: sums of as many terms, in float64."""
    w, z = arguments(kind, (2,), 5)
    g = torch.randn(2, 20_000)
    got = gradients(ops.vandermonde, [w, z], g)
    wanted = gradients(plain, [w, z], g)
    assert [x.dtype for x in got] == [torch.float32, w.dtype, z.dtype]
    assert largest_error([x.to(y.dtype) for x, y in zip(got, wanted, strict=True)], wanted) < 2**-23
    assert largest_error(got[2:], wanted[2:]) < 1e-10


def test_mixed_arguments() -> None:
    """Real weights of complex bases are complex ones; narrow ones are kept in float32; bases in float32 are meant."""
    w, z = arguments("complex", (3,), 4)
    got = ops.vandermonde(w.real, z, 70)
    assert torch.equal(got, ops.vandermonde(torch.complex(w.real, 0 * w.real), z, 70))
    wanted = ops.vandermonde(w.real.bfloat16().float(), z, 70)
    assert torch.equal(ops.vandermonde(w.real.bfloat16(), z, 70), wanted) and wanted.dtype == torch.float32
    z = z.to(torch.complex64)
    assert torch.equal(ops.vandermonde(w, z, 70), ops.vandermonde(w, z.to(torch.complex128), 70))


@pytest.mark.parametrize("backend", FAST)
def test_broadcasting_and_strides(backend: str) -> None:
    w, z = arguments("complex", (3, 4), 6)
    g = torch.randn(3, 4, 90)
    wanted = gradients(ops.vandermonde, [w, z[:1].expand(3, 4, 6)], g, backend=backend)
    got = gradients(ops.vandermonde, [w, z[0]], g, backend=backend)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[2], wanted[2].sum(0), rtol=1e-12, atol=1e-12)
    strided = [w.mT.contiguous().mT, z[0].conj().clone().conj()]
    assert not strided[0].is_contiguous() and strided[1].is_conj()
    again = gradients(ops.vandermonde, strided, g.mT.contiguous().mT, backend=backend)
    assert backend != "cpu" or all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    assert largest_error(again, got) < 1e-6  # a matrix product may sum in another order


@pytest.mark.skipif(native.kernels is None, reason=native.reason)
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_poisoned_memory_and_threads(kind: str) -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    w, z = arguments(kind, (7,), 5)
    g = torch.randn(7, 9000)
    check_threads(lambda: gradients(ops.vandermonde, [w, z], g, backend="cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_dies_out_and_what_grows(backend: str) -> None:
    """Down to zero without noise, and up to the infinity of float32."""
    w = torch.ones(1, 1)
    for rate in (-1.0, -20.0, -800.0, 0.0, 0.5):
        z = torch.full((1, 1), rate).double()
        kernel = ops.vandermonde(w, z, 1000, backend=backend)
        wanted = torch.exp(rate * torch.arange(1000, dtype=torch.float64)).float()
        torch.testing.assert_close(kernel[0], wanted, rtol=2**-23, atol=1e-45)
        assert (rate < 0.5) == kernel.isfinite().all().item()


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("backend", FAST)
def test_differentiable_twice(backend: str, kind: str) -> None:
    values = [x.requires_grad_() for x in arguments(kind, (2,), 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda w, z: ops.vandermonde(w, z, 5, backend=backend), values)
    assert torch.autograd.gradgradcheck(lambda w, z: ops.vandermonde(w, z, 5, backend=backend), values)


def test_no_tensor_holds_every_power() -> None:
    d, n, length = 4, 16, 16_384
    w, z = arguments("complex", (d,), n)
    z, g = z.to(torch.complex128), torch.randn(d, length)
    with Watch() as watch:
        chunked.vandermonde(w, z, length)
        chunked.vandermonde_backward(g, w, z)
    assert watch.peak < 40 * d * n * 128 * 16 + 4 * d * length * 8  # a few factors of √length, a few kernels
    assert watch.largest < d * n * length * 16 / 30


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
def test_mistakes() -> None:
    w, z = arguments("complex", (3,), 4)
    with pytest.raises(ValueError, match="same number of states"):
        ops.vandermonde(w, z[:, :3], 5)
    with pytest.raises(ValueError, match="do not broadcast"):
        ops.vandermonde(w, z[:2], 5)
    with pytest.raises(ValueError, match="at least 0"):
        ops.vandermonde(w, z, -1)
    with pytest.raises(ValueError, match="Did you mean"):
        ops.vandermonde(w, z, 5, backend="chunkd")


@pytest.mark.compiled
@pytest.mark.parametrize("backend", [None, *FAST])
def test_compile_and_export(backend: str | None) -> None:
    w, z = arguments("complex", (3,), 4)

    class Module(torch.nn.Module):
        def forward(self, w: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return ops.vandermonde(w, z, 70, backend=backend)

    torch._dynamo.reset()
    wanted = Module()(w, z)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(w, z), wanted)
    assert torch.equal(torch.export.export(Module(), (w, z)).module()(w, z), wanted)
