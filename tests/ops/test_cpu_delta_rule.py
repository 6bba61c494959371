"""The compiled kernel of the delta rule against the reference in float64: outputs, states and every gradient."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from longstate import native, ops
from longstate.ops.linear_attention import cpu
from ops.test_against_reference import flags, run

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

KINDS = ("none", "step", "channel")
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


def arguments(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the op takes, with keys of length 1 (or a little less) and write strengths up to 2."""
    b, t, g, h, k, p = shape
    torch.manual_seed(sum(shape))
    q, v, beta = torch.randn(b, t, g, k), torch.randn(b, t, h, p), 2 * torch.rand(b, t, h)
    key = 0.99 * torch.nn.functional.normalize(torch.randn(b, t, g, k), dim=-1)
    given = dict(q=q.to(dtype), k=key.to(dtype), v=v.to(dtype), beta=beta.to(dtype))
    given |= dict(initial=torch.randn(b, h, k, p))
    if kind != "none":
        given |= dict(log_decay=-0.05 - 3 * torch.rand((b, t, h) if kind == "step" else (b, t, h, k)) ** 4)
    return given


def exact(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() for name, x in given.items()}


def check(found: list[torch.Tensor], wanted: list[torch.Tensor], roundings: int) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        bound = roundings * UNIT[torch.float32] + (UNIT[torch.bfloat16] if x.dtype == torch.bfloat16 else 0)
        assert (x.double() - y).norm() <= bound * y.norm(), ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("marks", ["", "start valid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, marks: str, instructions: str
) -> None:
    # With |k| ≤ 1 and β ≤ 2 no step makes an error of the state larger, or one of its gradient on the way back. Each
    # adds the roundings of sums of k or p products, T times; a gradient is a sum of products of the two. What a norm of
    # sums of independent numbers loses beside the sum of their norms is less than the factor 8 here. What is returned
    # in bfloat16 is rounded once more, and so is the gradient that comes in.
    b, t, _, _, k, p = shape
    given, options = arguments(kind, shape, dtype), flags(marks, b, t)
    wanted = run(ops.delta_rule, exact(given), backend="reference", **options)
    found = run(ops.delta_rule, given, backend="cpu", **options)
    assert [x.dtype for x in found[2:]] == [x.dtype for x in given.values()] and found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    narrow = dtype == torch.bfloat16  # the gradient of y holds 2 y, rounded
    check(found, wanted, 8 * (t + k + p) + (2**17 if narrow else 0))


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_without_gradient(kind: str, instructions: str) -> None:
    for shape, marks, dtype in product(
        [(3, 1, 2, 4, 5, 7), (1, 1, 1, 3, 33, 64), (1, 1, 1, 5, 64, 300)], ("", "start"), UNIT
    ):
        given, options = arguments(kind, shape, dtype), flags(marks, *shape[:2])
        before = given["initial"].clone()
        found = ops.delta_rule(**given, backend="cpu", **options)
        wanted = ops.delta_rule(**exact(given), backend="reference", **options)
        check(list(found), list(wanted), 2 * shape[4] + 16)
        assert torch.equal(given["initial"], before) and found[0].dtype == dtype


def test_poisoned_memory_and_threads() -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    before, deterministic = torch.get_num_threads(), torch.utils.deterministic
    kept = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        for kind, shape in product(KINDS, [(2, 150, 1, 6, 9, 20), (2, 1, 1, 30, 64, 40)]):
            given, options, found = arguments(kind, shape), flags("start", *shape[:2]), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    alone = ops.delta_rule(**given, backend="cpu", **options)
                found.append([*alone, *run(ops.delta_rule, given, backend="cpu", **options)])
            assert all(x.isfinite().all() for x in found[0])
            for others in found[1:]:
                assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(kept[0])
        deterministic.fill_uninitialized_memory = kept[1]


def test_a_key_is_read_back_as_it_was_written() -> None:
    """With β = 1 the state holds, at the last key, exactly the last value; with β = 0 nothing is written."""
    given = arguments("none", (1, 50, 1, 2, 8, 6))
    given["k"] = torch.nn.functional.normalize(given["k"], dim=-1)
    given["q"] = given["k"]
    y, _ = ops.delta_rule(**given | {"beta": torch.ones_like(given["beta"])}, backend="cpu")
    torch.testing.assert_close(y, given["v"], rtol=0, atol=1e-5)
    _, final = ops.delta_rule(**given | {"beta": torch.zeros_like(given["beta"])}, backend="cpu")
    assert torch.equal(final, given["initial"])


def test_a_start_forgets_what_is_no_number(instructions: str) -> None:
    for kind, length in product(KINDS, (1, 20)):
        given = arguments(kind, (1, length, 1, 2, 3, 20))
        given["initial"] = torch.full_like(given["initial"], float("nan"))
        start = torch.zeros(1, length, dtype=torch.bool)
        start[:, 0] = True
        y, final = ops.delta_rule(**given, start=start, backend="cpu")
        assert y.isfinite().all() and final.isfinite().all()
        y, final = ops.delta_rule(**given, backend="cpu")
        assert y.isnan().all() and final.isnan().all()


def test_what_the_kernel_does_not_take() -> None:
    given = arguments("step", (1, 4, 1, 2, 3, 2))
    for change in (exact(given), dict(v=given["v"].half()), dict(initial=given["initial"].double())):
        with pytest.raises(ValueError, match="float32 and bfloat16 on the CPU"):
            ops.delta_rule(**given | change, backend="cpu")
        ops.delta_rule(**given | change)  # another backend takes it


@pytest.mark.compiled
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_one_node(kind: str) -> None:
    given = {name: x.requires_grad_() for name, x in arguments(kind, (2, 5, 1, 2, 3, 4)).items()}
    start = torch.rand(2, 5) < 0.3
    ordered = [given.get(name) for name in ("q", "k", "v", "log_decay", "initial", "beta")]
    torch.library.opcheck(
        torch.ops.longstate.written_linear_attention.default, (*ordered, None, start, True, cpu.TILE, False, "cpu")
    )

    def function(**tensors: Any) -> Any:
        return ops.delta_rule(**tensors, start=start)

    torch._dynamo.reset()
    got, wanted = torch.compile(function, fullgraph=True, backend="aot_eager")(**given), function(**given)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
