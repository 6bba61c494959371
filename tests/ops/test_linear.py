"""The product with a matrix: exact dequantisation, and the kernel within what rounding explains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from longstate import native, ops
from longstate.mixers._parts import Linear
from longstate.ops.linear import chunked
from longstate.ops.linear.chunked import CHUNK, widened
from longstate.ops.linear.cpu import ROWS

compiled = pytest.mark.skipif(native.kernels is None, reason=native.reason)
# Outputs, inputs, groups of int8 weights: one, less than a vector, odd, several lines of the cache, odd groups, none.
SHAPES = [
    (1, 1, 1),
    (3, 5, 1),
    (7, 64, 2),
    (33, 130, 1),
    (18, 130, 10),
    (64, 256, 4),
    (5, 1031, 1),
    (0, 4, 1),
    (4, 0, 1),
]
KINDS = [torch.float32, torch.bfloat16, torch.int8]


def matrix(outputs: int, inputs: int, groups: int, kind: torch.dtype) -> dict[str, Tensor]:
    """A weight of some kind, with scales if it has them, and a bias."""
    if kind != torch.int8:
        return dict(weight=torch.randn(outputs, inputs).to(kind), bias=torch.randn(outputs).to(kind))
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return dict(weight=weight, bias=torch.randn(outputs), scale=torch.rand(outputs, groups) / 50)


def exact(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum of the magnitudes that it is made of, and that of the weights alone, in float64."""
    W = weight.double() if scale is None else widened(weight, scale, torch.float64)
    sizes = x.double().abs() @ W.abs().mT + bias.double().abs()
    return x.double() @ W.mT + bias.double(), sizes, W.abs().sum(-1)


def check(y: Tensor, x: Tensor, given: dict[str, Tensor]) -> None:
    """Each of n products and sums rounds by 2^-24 at most of the sum of magnitudes, a result in bfloat16 by 2^-8.

    Sums of whole numbers round x first, by half a unit of 2^-21 of its largest number at most. Torch's product in
    bfloat16 may round before the bias is added, and rounds int8 weights to bfloat16.
    """
    wanted, sizes, weights = exact(x, **given)
    bound = (given["weight"].shape[1] + 4) * 2.0**-24 * sizes
    if "scale" in given:
        bound = bound + functional.pad(x.double().abs(), (0, 1)).amax(-1, keepdim=True) * 2.0**-22 * weights
    if y.dtype == torch.bfloat16:
        bound = bound * 1.01 + 2.0**-8 * wanted.abs()
        if x.numel() > ROWS * x.shape[-1]:
            bound = bound + 2.0**-7 * sizes
    assert ((y.double() - wanted).abs() <= bound).all()


@compiled
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel(shape: tuple[int, int, int], kind: torch.dtype, instructions: str) -> None:
    given = matrix(*shape, kind)
    for rows in range(1, 10):
        for dtype in (torch.float32, torch.bfloat16):
            if kind in (dtype, torch.int8):
                x = torch.randn(1, rows, shape[1]).to(dtype)
                arguments = given | dict(bias=given["bias"].to(dtype))
                backend = "cpu" if rows < 9 and x.numel() and shape[0] else None
                y = ops.linear(x, **arguments, backend=backend)
                assert y.shape == (1, rows, shape[0]) and y.dtype == dtype
                check(y, x, arguments)


@compiled
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_wider_result_is_not_rounded(kind: torch.dtype, instructions: str) -> None:
    given = matrix(30, 50, 1, kind) | dict(bias=torch.randn(30))
    x = torch.randn(1, 2, 50).to(torch.bfloat16 if kind == torch.bfloat16 else torch.float32)
    y = ops.linear(x, **given, dtype=torch.float32, backend="cpu")
    assert y.dtype == torch.float32
    check(y, x, given)
    for backend in ("chunked", "reference"):
        y = ops.linear(x, **given, dtype=torch.float64, backend=backend)
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, exact(x, **given)[0], rtol=1e-2, atol=1e-1 if kind == torch.bfloat16 else 1e-4)


@compiled
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_threads_and_other_rows_change_no_bit(kind: torch.dtype, instructions: str) -> None:
    given = matrix(515, 320, 1, kind)  # large enough for several threads
    dtype = torch.float32 if kind == torch.int8 else kind
    x, before, found = torch.randn(8, 1, 320).to(dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.linear(x, **given, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for rows in range(1, 8):
        assert torch.equal(ops.linear(x[:rows], **given, backend="cpu"), found[0][:rows])


@compiled
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_strides_and_what_lies_beside(kind: torch.dtype, groups: int, instructions: str) -> None:
    """Rows at any distance, with what is no number between them, into memory that was not written."""
    dtype = torch.float32 if kind == torch.int8 else kind
    given = matrix(21, 35, groups, kind)
    wide = torch.full((21, 99), -128 if kind == torch.int8 else float("nan"), dtype=kind)
    wide[:, 7:42] = given["weight"]
    x = torch.full((2, 3, 120), float("nan"), dtype=dtype)
    x[..., 11:46] = torch.randn(2, 3, 35).to(dtype)
    wanted = ops.linear(x[..., 11:46].contiguous(), **given, backend="cpu")
    check(wanted, x[..., 11:46], given)
    deterministic, kept = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        strided = given | dict(weight=wide[:, 7:42])
        assert torch.equal(ops.linear(x[..., 11:46], **strided, backend="cpu"), wanted)
        apart = x[..., 11:46].contiguous().mT.contiguous().mT
        assert torch.equal(ops.linear(apart, **given, backend="cpu"), wanted)
        assert torch.equal(ops.linear(x[1, 2, 11:46], **given, backend="cpu"), wanted[1, 2])
        assert torch.equal(ops.linear(x[:, 1, 11:46][:, None, None], **given, backend="cpu")[:, 0, 0], wanted[:, 1])
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = kept


@compiled
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_no_number_stays_none_and_tiny_ones_stay(kind: torch.dtype, instructions: str) -> None:
    given = matrix(9, 70, 1, kind)
    given["weight"][given["weight"] == 0] = 1
    dtype = torch.float32 if kind == torch.int8 else kind
    for value in (float("inf"), -float("inf"), float("nan")):
        x = torch.ones(1, 2, 70, dtype=dtype)
        x[0, 0, 69] = value
        y = ops.linear(x, **given, backend="cpu")
        assert torch.equal(y[0, 0].isnan(), torch.full((9,), value != value)) and not y[0, 0].isfinite().any()
        check(y[:, 1:], x[:, 1:], given)
    for size in (1e-30, 1e-20, 1e30):
        x, given["bias"] = size * torch.randn(1, 3, 70).to(dtype), torch.zeros(9, dtype=dtype)
        check(ops.linear(x, **given, backend="cpu"), x, given)


@compiled
def test_whole_numbers_are_exact(instructions: str) -> None:
    """Whole numbers x below 2^21 and scales of powers of 2: nothing is rounded but the result."""
    weight, scale = torch.randint(-128, 128, (40, 777), dtype=torch.int8), torch.full((40, 1), 2.0**-9)
    x = torch.randint(-3000, 3001, (6, 1, 777)).float()
    wanted = x.double() @ weight.double().mT * 2.0**-9
    assert torch.equal(ops.linear(x, weight, None, scale, backend="cpu"), wanted.float())


@pytest.mark.parametrize("groups", [1, 3])
def test_int8_weights_are_exactly_their_scales_times_as_large(groups: int) -> None:
    """Products of 8 and 24 bits are whole in float64, and the portable path differs from that of floats by no bit."""
    given = matrix(70, 60, groups, torch.int8)
    W = given["weight"].double().view(70, groups, -1) * given["scale"].double()[..., None]
    assert torch.equal(widened(given["weight"], given["scale"], torch.float64), W.view(70, 60))
    x = torch.randn(9, 60, dtype=torch.float64)
    arguments = dict(weight=given["weight"], bias=given["bias"].double(), scale=given["scale"])
    assert torch.equal(ops.linear(x, **arguments), functional.linear(x, W.view(70, 60), given["bias"].double()))
    torch.testing.assert_close(ops.linear(x, **arguments, backend="reference"), ops.linear(x, **arguments))


def test_int8_weights_are_widened_piece_by_piece() -> None:
    given = matrix(2 * CHUNK // 1024 + 100, 1024, 1, torch.int8)
    x = torch.randn(10, 1024)
    check(ops.linear(x, **given), x, given)


def test_gradients_take_torchs_product() -> None:
    given = matrix(12, 8, 2, torch.int8)
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.linear(x, **given).sum(), x)
    torch.testing.assert_close(gradient, widened(given["weight"], given["scale"], torch.float32).sum(0).expand(2, 8))
    weight = torch.randn(4, 8, requires_grad=True)
    assert ops.linear(x.detach(), weight).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert ops.linear(x, weight).dtype == torch.bfloat16


def test_mistakes() -> None:
    x, weight, scale = torch.randn(2, 8), torch.randint(-9, 9, (4, 8), dtype=torch.int8), torch.rand(4, 3)
    for arguments, wanted in (
        (dict(weight=weight), "without scales"),
        (dict(weight=torch.randn(4, 8), scale=scale), "with scales"),
        (dict(weight=weight, scale=scale), "do not divide into 3 groups"),
    ):
        with pytest.raises(ValueError, match=wanted):
            ops.linear(x, **arguments)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(x, torch.randn(4, 8, dtype=torch.bfloat16))


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
def test_shapes_that_do_not_go_together() -> None:
    x, weight = torch.randn(2, 8), torch.randint(-9, 9, (4, 8), dtype=torch.int8)
    with torch.no_grad():
        for arguments in (dict(weight=torch.randn(4, 7)), dict(weight=torch.randn(4, 8), bias=torch.randn(3))):
            with pytest.raises(RuntimeError, match=r"shape|size"):
                ops.linear(x, **arguments)
        with pytest.raises(ValueError, match="shape"):
            ops.linear(x, weight, None, torch.rand(3, 1))


@compiled
def test_what_the_kernel_does_not_take() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    for change, reason in (
        (dict(x=torch.randn(9, 8)), "1 to 8 rows"),
        (dict(x=torch.randn(2, 8).double(), weight=weight.double()), "float32 and bfloat16"),
        (dict(weight=torch.randn(8, 4).mT), "side by side"),
        (dict(weight=nn.Parameter(weight)), "no gradient"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.linear(**dict(x=x, weight=weight) | change, backend="cpu")
        ops.linear(**dict(x=x, weight=weight) | change)  # torch takes it


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [torch.float32, torch.int8], ids=str)
def test_compiled_and_exported_with_any_length(kind: torch.dtype) -> None:
    given = matrix(6, 8, 2, kind)

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.linear(x, **given)

    with torch.no_grad():
        x, longer = torch.randn(1, 4, 8), torch.randn(1, 40, 8)
        torch._dynamo.reset()
        got = torch.compile(Product(), fullgraph=True, backend="aot_eager")(x)
        check(got, x, given)
        exported = torch.export.export(Product(), (x,), dynamic_shapes=({1: torch.export.Dim("t", min=1)},))
        check(exported.module()(longer), longer, given)


def test_a_layer_of_ours_is_torchs_in_all_but_speed() -> None:
    torch.manual_seed(1)
    ours = Linear(7, 5)
    torch.manual_seed(1)
    theirs = nn.Linear(7, 5)
    assert isinstance(ours, nn.Linear)
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 1, 7)
    with torch.no_grad():
        check(ours(x), x, dict(weight=theirs.weight, bias=theirs.bias))
    ours(x).sum().backward()
    assert ours.weight.grad is not None


@compiled
def test_reading_memory(instructions: str) -> None:
    assert native.kernels is not None
    x, found = torch.arange(64_000.0) % 7, torch.full((1,), float("nan"))
    for threads in (1, 2, 5):
        native.kernels.read_memory(x.data_ptr(), x.numel(), threads, found.data_ptr())
        assert found == x.sum()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_are_torchs(kind: torch.dtype) -> None:
    """They go into other memory, and are the same numbers; autocast and gradients are seen."""
    x, weight = torch.randn(2, 513, 24, dtype=kind).mT.contiguous().mT, torch.randn(2100, 24, dtype=kind)
    assert chunked._is_large(x, weight) == (native.kernels is not None)
    got = ops.linear(x, weight)
    assert got.shape == (2, 513, 2100) and got.is_contiguous()
    torch.testing.assert_close(got, functional.linear(x, weight))
    assert ops.linear(x, weight.requires_grad_()).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype is torch.bfloat16


@compiled
@pytest.mark.parametrize("sizes", [(3, 2060, 1024), (1400, 1500, 24), (2200, 24, 1000)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients_are_torchs(sizes: tuple[int, int, int], kind: torch.dtype) -> None:
    """Of the result, the weight or the input, whichever is large; differentiated once and twice, in whole numbers."""
    rows, outputs, inputs = sizes
    x, weight = (torch.randint(-2, 3, (n, inputs)).to(kind).requires_grad_() for n in (rows, outputs))
    seen = torch.randint(-1, 2, (1, rows, outputs)).to(kind)
    assert chunked._is_large(x[None], weight)

    def gradients(product: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        y = product(x[None], weight)
        first = torch.autograd.grad(y, (x, weight), seen, create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach()).sum() for g in first), (x, weight))
        return [y, *first, *second]

    found = gradients(ops.linear)
    assert all(x.is_contiguous() for x in found[:3])
    for got, wanted in zip(found, gradients(functional.linear), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    loss = ops.linear(x[None], weight).sum()
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled
def test_what_needs_no_gradient_gets_none() -> None:
    x, weight = torch.randn(5, 1024), torch.randn(1100, 1024, requires_grad=True)
    for a, b in ((x, weight), (x.clone().requires_grad_(), weight.detach())):
        ops.linear(a, b).sum().backward()
        assert (a.grad is None) is not a.requires_grad and (b.grad is None) is not b.requires_grad


@compiled
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch's own forward mode
def test_large_products_are_seen_by_transforms() -> None:
    """Forward mode, vmap and traces see torch's own product."""
    x, weight = torch.randn(3, 1024), torch.randn(1100, 1024, requires_grad=True)
    with forward_ad.dual_level(), torch.no_grad():
        moving = forward_ad.make_dual(weight.detach(), torch.ones(1100, 1024))
        change = forward_ad.unpack_dual(ops.linear(x, moving)).tangent
    torch.testing.assert_close(change, functional.linear(x, torch.ones(1100, 1024)))
    many = torch.func.vmap(torch.func.grad(lambda a, w: ops.linear(a, w).sum(), 1), (0, None))(x[:, None], weight)
    torch.testing.assert_close(many[1], x[1].expand(1100, -1))
