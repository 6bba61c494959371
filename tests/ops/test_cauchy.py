"""Cauchy sums: by 50 digits, by the plain sum, their gradients, as the kernel of S4, and how they are called."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from longstate import native, ops
from longstate.ops.cauchy import chunked
from longstate.systems import bilinear, diagonal_modes, legs, legs_normal
from ops.test_against_reference import largest_error
from ops.test_calls import Watch
from ops.threads import check_threads

BACKENDS = [name for name, what in ops.backends()["cauchy"].items() if what in ("in use", "on request")]
FAST = [name for name in BACKENDS if name != "reference"]


def arguments(
    kind: str, sums: tuple[int, ...], rows: tuple[int, ...], states: int, nodes: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return weights, nodes on the imaginary axis, and poles left of it."""
    torch.manual_seed(states + nodes)
    poles = -0.1 - torch.rand(*rows, states, dtype=torch.float64)
    if kind == "complex":
        poles = torch.complex(poles, 5 * torch.randn_like(poles))
    w = torch.randn(*sums, *rows, states, dtype=dtype.to_complex() if kind == "complex" else dtype)
    z = torch.complex(torch.zeros(nodes), torch.linspace(-8, 8, nodes)).to(torch.complex128)
    return [w, z, poles]


def plain(w: torch.Tensor, z: torch.Tensor, poles: torch.Tensor) -> torch.Tensor:
    """Return the sum as it is written, in float64; differentiable."""
    total = (w[..., None] / (z - poles[..., None])).sum(-2)
    return total + (w.conj()[..., None] / (z - poles.conj()[..., None])).sum(-2) if w.is_complex() else total


def gradients(function: Any, given: list[torch.Tensor], g: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    w, z, poles = given
    leaves = [x.detach().clone().requires_grad_() for x in (w, poles)]
    kernel = function(leaves[0], z, leaves[1], **options)
    total = (kernel * g.conj()).real.sum() + sum(
        0 * x.real.sum() for x in leaves
    )  # of no poles, the reference has none
    return [kernel.detach(), *torch.autograd.grad(total, leaves)]


def check_fifty_digits(backend: str, dtype: torch.dtype) -> None:
    """A float32 result is the exact one, rounded; in float64 the error is that of the terms.

    With a = 2 Re w and b = −2 Im w Im λ a pair is (a (z − Re λ) + b) R, R = 1/((z − λ)(z − λ̄)). The three differences
    in R are rounded once each, which is 3 of its own units; the products and the quotient add fewer than 20, the sum of
    two terms for each pole another 2n: (25 + 2n) 2⁻⁵³ of |a (z − Re λ) R| + |b R|, for each part √2 more.
    """
    w, _, poles = arguments("complex", (), (2,), 12, 0, dtype)
    near = poles[0, :3]
    z = torch.cat([near + 1e-3, near.conj() - 1e-9j, near * (1 + 1e-14), torch.tensor([0.0, 3j, -7j, 2 - 1j, 1e16j])])
    kernel = ops.cauchy(w, z, poles, backend=backend)
    assert kernel.dtype == dtype.to_complex()
    with mpmath.workdps(50):
        for row in range(2):
            for step, node in enumerate(map(mpmath.mpc, z.tolist())):
                exact, size = mpmath.mpc(0), mpmath.mpf(0)
                for v, pole in zip(map(mpmath.mpc, w[row].tolist()), map(mpmath.mpc, poles[row].tolist()), strict=True):
                    exact += v / (node - pole) + v.conjugate() / (node - pole.conjugate())
                    R = 1 / ((node - pole) * (node - pole.conjugate()))
                    size += abs(2 * v.real * (node - pole.real) * R) + abs(2 * v.imag * pole.imag * R)
                got = kernel[row, step]
                bound = float(size) * 2**0.5 * (25 + 24) * 2**-53
                for part, wanted in ((got.real, exact.real), (got.imag, exact.imag)):
                    rounded = 2**-24 * float(abs(wanted)) if dtype == torch.float32 else 0
                    assert float(abs(mpmath.mpf(part.item()) - wanted)) <= bound + rounded, (row, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_digits(dtype: torch.dtype) -> None:
    check_fifty_digits("chunked", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_digits_of_every_instruction_set(dtype: torch.dtype, instructions: str) -> None:
    check_fifty_digits("cpu", dtype)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sums", "rows", "states"),
    [((), (), 1), ((), (3,), 5), ((4,), (3,), 8), ((5,), (), 3), ((2, 2), (2, 3), 4), ((0,), (2,), 3), ((2,), (2,), 0)],
    ids=str,
)
def test_the_plain_sum(sums: tuple[int, ...], rows: tuple[int, ...], states: int, backend: str, kind: str) -> None:
    """Also gradients; in float64, where every sum is of at most a few hundred terms, of quotients up to 100."""
    for nodes in (0, 1, 2, 7, 8, 9, 70):
        given = arguments(kind, sums, rows, states, nodes, torch.float64)
        g = torch.randn(*sums, *rows, nodes, dtype=torch.complex128)
        got, wanted = (gradients(f, given, g, **o) for f, o in ((ops.cauchy, {"backend": backend}), (plain, {})))
        assert largest_error(got, wanted) < 1e-12


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("sums", [1, 4, 6])
def test_every_instruction_set(sums: int, kind: str, instructions: str) -> None:
    """In more than one piece of 8192 nodes. Gradients of 20,000 nodes: sums of as many terms, in float64."""
    given = arguments(kind, (sums,), (2,), 5, 20_001)
    g = torch.randn(sums, 2, 20_001, dtype=torch.complex64)
    got, wanted = gradients(ops.cauchy, given, g), gradients(plain, given, g)
    assert [x.dtype for x in got] == [torch.complex64, given[0].dtype, given[2].dtype]
    assert largest_error([x.to(y.dtype) for x, y in zip(got, wanted, strict=True)], wanted) < 2**-23
    assert largest_error(got[2:], wanted[2:]) < 1e-10


def test_the_kernel_of_a_dplr_system() -> None:
    """S4 with LegS = Λ − P Pᵀ in the basis of its normal part, by four sums, against powers of the dense matrix."""
    n, length, dt = 16, 64, 0.05
    A, B = legs(n)
    P, C = np.sqrt(np.arange(n) + 0.5), np.random.default_rng(0).standard_normal(n)
    discrete, drive = bilinear(A, B, dt)
    wanted = [C @ np.linalg.matrix_power(discrete, step) @ drive for step in range(length)]
    modes = diagonal_modes(*legs_normal(n))
    V = modes.basis
    tilde = C - C @ np.linalg.matrix_power(discrete, length)
    c, b, p = (torch.from_numpy(x) for x in (tilde @ V, V.conj().T @ B, V.conj().T @ P))
    omega = torch.exp(-2j * torch.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length)
    weights = torch.stack([c * b, c * p, p.conj() * b, p.conj() * p])
    cb, cp, pb, pp = ops.cauchy(
        weights, 2 * (1 - omega[:-1]) / (1 + omega[:-1]), dt * torch.from_numpy(modes.eigenvalues)
    )
    transform = 2 * dt / (1 + omega[:-1]) * (cb - cp * pb / (1 / dt + pp))
    last = torch.tensor([dt * tilde @ B / 2], dtype=torch.complex128)  # where ω = −1
    got = torch.fft.irfft(torch.cat([transform, last]), length)
    assert largest_error([got], [torch.tensor(wanted)]) < 1e-9


def test_mixed_arguments() -> None:
    """Real weights of complex poles are complex ones; narrow ones are kept in float32; so are real nodes."""
    w, z, poles = arguments("complex", (2,), (3,), 4, 11)
    wanted = ops.cauchy(torch.complex(w.real, 0 * w.real), z, poles)
    assert torch.equal(ops.cauchy(w.real, z, poles), wanted) and wanted.dtype == torch.complex64
    assert torch.equal(ops.cauchy(w.real.bfloat16(), z, poles), ops.cauchy(w.real.bfloat16().float(), z, poles))
    torch.testing.assert_close(ops.cauchy(w, z.imag, poles), plain(w, z.imag, poles).to(torch.complex64))


@pytest.mark.parametrize("backend", FAST)
def test_strides_and_lazy_conjugates_do_not_matter(backend: str) -> None:
    w, z, poles = arguments("complex", (4,), (3,), 6, 90)
    g = torch.randn(4, 3, 90, dtype=torch.complex64)
    wanted = gradients(ops.cauchy, [w, z, poles], g, backend=backend)
    strided = [w.mT.contiguous().mT, z.conj().clone().conj(), poles.mT.contiguous().mT]
    got = gradients(ops.cauchy, strided, g.mT.contiguous().mT.conj().clone().conj(), backend=backend)
    assert backend != "cpu" or all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert largest_error(got, wanted) < 1e-6  # a matrix product may sum in another order


@pytest.mark.skipif(native.kernels is None, reason=native.reason)
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_poisoned_memory_and_threads(kind: str) -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    given = arguments(kind, (5,), (7,), 3, 9001)
    g = torch.randn(5, 7, 9001, dtype=torch.complex64)
    check_threads(lambda: gradients(ops.cauchy, given, g, backend="cpu"))


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("backend", FAST)
def test_differentiable_twice(backend: str, kind: str) -> None:
    w, z, poles = arguments(kind, (2,), (2,), 3, 4, torch.float64)
    values = [x.requires_grad_() for x in (w, poles)]
    assert torch.autograd.gradcheck(lambda w, poles: ops.cauchy(w, z, poles, backend=backend), values)
    assert torch.autograd.gradgradcheck(lambda w, poles: ops.cauchy(w, z, poles, backend=backend), values)


def test_no_tensor_holds_every_quotient() -> None:
    d, n, nodes = 8, 32, 8193
    w, z, poles = arguments("complex", (4,), (d,), n, nodes)
    a = torch.randn(4, d, n, dtype=torch.float64)
    g = torch.randn(4, d, nodes, dtype=torch.complex64)
    with Watch() as watch:
        chunked.cauchy(a, a, poles.real, poles.imag, z, True)
        chunked.cauchy_backward(g, a, a, poles.real, poles.imag, z)
    assert watch.largest < d * n * nodes * 16 / 3
    assert watch.peak < 30 * chunked.QUOTIENTS * 16 + 6 * w.shape[0] * d * nodes * 16


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
def test_mistakes() -> None:
    w, z, poles = arguments("complex", (4,), (3,), 5, 6)
    for wrong in (poles[:, :4], poles[:2], poles[None].expand(2, 3, 5)):
        with pytest.raises(ValueError, match="end in the axes of poles"):
            ops.cauchy(w, z, wrong)
    with pytest.raises(ValueError, match="nodes has shape"):
        ops.cauchy(w, z[None], poles)
    with pytest.raises(ValueError, match="no gradient"):
        ops.cauchy(w, z.requires_grad_(), poles)
    with pytest.raises(ValueError, match="Did you mean"):
        ops.cauchy(w, z.detach(), poles, backend="chunkd")


@pytest.mark.compiled
@pytest.mark.parametrize("backend", [None, *FAST])
def test_compile_and_export(backend: str | None) -> None:
    given = arguments("complex", (4,), (3,), 5, 70)

    class Module(torch.nn.Module):
        def forward(self, w: torch.Tensor, z: torch.Tensor, poles: torch.Tensor) -> torch.Tensor:
            return ops.cauchy(w, z, poles, backend=backend)

    torch._dynamo.reset()
    wanted = Module()(*given)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(*given), wanted)
    assert torch.equal(torch.export.export(Module(), tuple(given)).module()(*given), wanted)
