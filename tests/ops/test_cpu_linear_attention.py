"""The compiled kernel of linear attention against the reference in float64: outputs, states and every gradient."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from longstate import native, ops
from longstate.ops.linear_attention import cpu
from ops.test_against_reference import flags

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

KINDS = ("none", "head", "step", "channel")
# Batch, steps, groups, heads, keys, values: no step, one, two, a chunk and one more, several tiles and pieces of heads.
SHAPES = [
    (2, 0, 1, 2, 3, 4),
    (2, 1, 1, 1, 1, 1),
    (2, 2, 1, 2, 3, 5),
    (2, 17, 2, 4, 5, 7),
    (1, 70, 1, 6, 17, 33),
    (1, 290, 2, 2, 35, 16),
]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def arguments(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, around: bool = False
) -> dict[str, Any]:
    """What the op takes; `around` it too, with a skip for each head or channel."""
    b, t, g, h, k, p = shape
    torch.manual_seed(sum(shape))
    q, key, v = torch.randn(b, t, g, k), torch.randn(b, t, g, k), torch.randn(b, t, h, p)
    of = {"none": None, "head": (h,), "step": (b, t, h), "channel": (b, t, h, k)}[kind]
    decay = None if of is None else -0.05 - 3 * torch.rand(of) ** 4
    given = dict(q=q.to(dtype), k=key.to(dtype), v=v.to(dtype), log_decay=decay, initial=torch.randn(b, h, k, p))
    if around:
        given |= dict(dt=torch.rand(b, t, h).to(dtype), D=torch.randn((h,) if kind in ("head", "step") else (h, p)))
    return given


def run(given: dict[str, Any], weights: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Return outputs, the final state, and the gradients of their sum with weights."""
    given = {name: None if x is None else x.detach().requires_grad_() for name, x in given.items()}
    results = ops.linear_attention(**given, **options)
    tensors = {name: x for name, x in given.items() if x is not None}
    total = [x.mul(w.to(x.dtype)) for x, w in zip(results, weights, strict=True)]
    gradients = torch.autograd.grad(
        sum(x.double().sum() for x in total), list(tensors.values()), allow_unused=True, materialize_grads=True
    )
    found = dict(zip(("y", "final"), results, strict=True)) | {
        f"d{n}": d for n, d in zip(tensors, gradients, strict=True)
    }
    return {name: x.detach() for name, x in found.items()}


def exact(given: dict[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else x.double() for name, x in given.items()}


def magnitudes(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x if x is None or name == "log_decay" else x.abs() for name, x in given.items()}


@pytest.mark.parametrize(("marks", "around"), [("", False), ("", True), ("start valid", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, marks: str, around: bool, instructions: str
) -> None:
    # Each result is a sum of products; with every argument replaced by its magnitude it is the sum M of their
    # magnitudes. A product meets at most 2 T roundings of decays and eight of other factors, and sums of at most T
    # steps, k keys and p values: in any order the whole errs by (3 T + k + p + 8) u M. What is returned in bfloat16 is
    # rounded once more.
    b, t, _, h, k, p = shape
    given, options = arguments(kind, shape, dtype, around), flags(marks, b, t)
    weights = [torch.randn(b, t, h, p).to(dtype), torch.randn(b, h, k, p)]
    wanted = run(exact(given), weights, backend="reference", **options)
    size = run(magnitudes(exact(given)), [w.abs() for w in weights], backend="reference", **options)
    for name, x in run(given, weights, backend="cpu", **options).items():
        like = given.get(name.removeprefix("d"), given["v"] if name == "y" else given["initial"])
        assert x.shape == wanted[name].shape and x.dtype == like.dtype
        bound = (3 * t + k + p + 8) * UNIT[torch.float32] * size[name]
        bound = bound + (UNIT[torch.bfloat16] * wanted[name].abs() if x.dtype == torch.bfloat16 else 0)
        error = (x.double() - wanted[name]).abs()
        assert (error <= bound).all(), (name, (error / bound).max().item())
        if (
            x.dtype == torch.float32 and name != "dD" and (name, kind) != ("dlog_decay", "head")
        ):  # sums over all steps that cancel
            assert bound.norm() <= 0.02 * wanted[name].norm(), "a bound that anything would pass"


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_without_gradient(kind: str, instructions: str) -> None:
    """It has its own way through the state, which it leaves as it is."""
    for shape, marks, dtype in product(
        [(3, 1, 2, 4, 5, 7), (1, 1, 1, 3, 33, 64), (1, 1, 1, 5, 64, 300)], ("", "start"), UNIT
    ):
        given, options = arguments(kind, shape, dtype, around=True), flags(marks, *shape[:2])
        before = given["initial"].clone()
        y, final = ops.linear_attention(**given, backend="cpu", **options)
        wanted, wanted_final = ops.linear_attention(**exact(given), backend="reference", **options)
        size, size_final = ops.linear_attention(**magnitudes(exact(given)), backend="reference", **options)
        rounding = UNIT[torch.bfloat16] * wanted.abs() if dtype == torch.bfloat16 else 0
        assert ((y.double() - wanted).abs() <= (shape[4] + 8) * 2.0**-24 * size + rounding).all()
        assert ((final.double() - wanted_final).abs() <= 8 * 2.0**-24 * size_final).all()
        assert torch.equal(given["initial"], before) and y.dtype == dtype


def test_poisoned_memory_and_threads() -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    before, deterministic = torch.get_num_threads(), torch.utils.deterministic
    kept = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        for kind, shape in product(KINDS, [(2, 150, 1, 6, 9, 20), (2, 1, 1, 30, 64, 40)]):
            b, t, _, h, k, p = shape
            given, options = arguments(kind, shape, around=True), flags("start", b, t)
            weights, found = [torch.randn(b, t, h, p), torch.randn(b, h, k, p)], []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    alone = ops.linear_attention(**given, backend="cpu", **options)
                found.append([*alone, *run(given, weights, backend="cpu", **options).values()])
            assert all(x.isfinite().all() for x in found[0])
            for others in found[1:]:
                assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(kept[0])
        deterministic.fill_uninitialized_memory = kept[1]


@pytest.mark.parametrize("dtype", UNIT, ids=["float32", "bfloat16"])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    """Queries, keys and values may be parts of the same rows; anything else is copied."""
    b, t, g, h, k, p = shape = (2, 40, 2, 4, 5, 7)
    for kind, length in product(KINDS, (t, 1)):
        given = arguments(kind, (b, length, *shape[2:]), dtype)
        widths = [g * k, g * k, h * p]
        joined = torch.cat([given[name].flatten(2) for name in "qkv"], -1).split(widths, -1)
        cut = {name: x.unflatten(2, (n, -1)) for name, x, n in zip("qkv", joined, (g, g, h), strict=True)}
        assert not length > 1 or cut["v"].stride(1) == sum(widths)
        moved = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
        moved |= {
            name: given[name].mT.contiguous().mT
            for name in ("log_decay", "initial")
            if (given[name] is not None) and given[name].ndim > 1
        }
        weights = [torch.randn(b, length, h, p).to(dtype), torch.randn(b, h, k, p)]
        wanted = run(given, weights, backend="cpu")
        for other in (cut, moved):
            got = run(given | other, weights, backend="cpu")
            assert all(torch.equal(x, got[name]) for name, x in wanted.items())
            with torch.no_grad():
                y, final = ops.linear_attention(**given | other, backend="cpu")
            torch.testing.assert_close(y, wanted["y"])
            torch.testing.assert_close(final, wanted["final"])


def test_what_the_kernel_does_not_take() -> None:
    given = arguments("step", (1, 4, 1, 2, 3, 2))
    for change in (exact(given), dict(v=given["v"].half()), dict(initial=given["initial"].double())):
        with pytest.raises(ValueError, match="float32 and bfloat16 on the CPU"):
            ops.linear_attention(**given | change, backend="cpu")
        ops.linear_attention(**given | change)  # another backend takes it
    narrow = {name: given[name].bfloat16() for name in ("log_decay", "initial")}
    assert ops.linear_attention(**given | narrow, backend="cpu")[1].dtype == torch.float32


@pytest.mark.parametrize("kind", ["head", "step", "channel"])
def test_decays_near_one_do_not_add_up_their_roundings(kind: str) -> None:
    """The state is rounded once for each chunk of 16 steps, or step that comes alone; a factor of 1 − 10⁻⁶, which has
    two digits in float32, would be wrong by more than that each time."""
    given = arguments(kind, (1, 4000, 1, 2, 4, 4))
    given |= dict(log_decay=torch.full_like(given["log_decay"], -1e-6), k=given["k"] / 100)
    inputs = {name: x for name, x in given.items() if name != "initial"}
    wanted = ops.linear_attention(**exact(given), backend="reference")[1]
    got = ops.linear_attention(**given, backend="cpu")[1]
    assert (got - wanted).abs().max() < 4000 / 16 * 2.0**-24 * wanted.abs().max()
    state = given["initial"]
    for t in range(1000):
        step = {name: x if x.ndim == 1 else x[:, t : t + 1] for name, x in inputs.items()}
        _, state = ops.linear_attention(**step, initial=state, backend="cpu")
    some = {name: x if x.ndim == 1 else x[:, :1000] for name, x in inputs.items()} | {"initial": given["initial"]}
    wanted = ops.linear_attention(**exact(some), backend="reference")[1]
    assert (state - wanted).abs().max() < 1000 * 2.0**-24 * wanted.abs().max()


def test_a_start_forgets_what_is_no_number(instructions: str) -> None:
    for kind, length in product(KINDS, (1, 20)):
        given = arguments(kind, (1, length, 1, 2, 3, 20))
        given["initial"] = torch.full_like(given["initial"], float("nan"))
        start = torch.zeros(1, length, dtype=torch.bool)
        start[:, 0] = True
        y, final = ops.linear_attention(**given, start=start, backend="cpu")
        assert y.isfinite().all() and final.isfinite().all()
        y, final = ops.linear_attention(**given, backend="cpu")
        assert y.isnan().all() and final.isnan().all()


def test_states_kept_for_the_backward_pass_are_few() -> None:
    """One for every 128 steps: k/128 of the memory of v."""
    given = [*arguments("step", (1, 640, 1, 2, 16, 8)).values(), None, None, None]
    assert cpu.linear_attention(*given, False, cpu.TILE, False)[2].shape == (6, 1, 2, 16, 8)
    assert cpu.linear_attention(*given, False, 0, False)[2].numel() == 0


@pytest.mark.compiled
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_one_node(kind: str) -> None:
    given = arguments(kind, (2, 5, 1, 2, 3, 4), around=True)
    given = {name: None if x is None else x.requires_grad_() for name, x in given.items()}
    start = torch.rand(2, 5) < 0.3
    torch.library.opcheck(
        torch.ops.longstate.written_linear_attention.default, (*given.values(), start, False, cpu.TILE, False, "cpu")
    )

    def function(**tensors: Any) -> Any:
        return ops.linear_attention(**tensors, start=start)

    torch._dynamo.reset()
    got, wanted = torch.compile(function, fullgraph=True, backend="aot_eager")(**given), function(**given)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
