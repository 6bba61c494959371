"""The Triton kernels of linear attention against the reference in float64: outputs, states and every gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longstate import ops
from longstate.ops import _triton
from longstate.ops.linear_attention import _fused
from ops.test_against_reference import flags
from poison import poisoned_memory

# Batch, steps, groups, heads, keys, values: no step, one, a chunk and one more, two segments of two chunks and two
# blocks of keys and of values.
CASES = [
    ("none", (1, 17, 1, 2, 5, 7)),
    ("head", (1, 35, 1, 2, 5, 7)),
    *((kind, (2, t, 1, 1, 2, 3)) for kind in ("step", "channel") for t in (0, 1)),
    ("step", (2, 17, 2, 4, 5, 7)),
    ("channel", (1, 17, 1, 2, 5, 7)),
    ("step", (1, 50, 1, 2, 18, 17)),
    ("channel", (1, 50, 1, 1, 18, 17)),
]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def arguments(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, around: bool = True
) -> dict[str, Any]:
    """What the op takes, with Δ and D if `around`."""
    b, t, g, h, k, p = shape
    torch.manual_seed(sum(shape))
    q, key, v = torch.randn(b, t, g, k), torch.randn(b, t, g, k), torch.randn(b, t, h, p)
    of = {"none": None, "head": (h,), "step": (b, t, h), "channel": (b, t, h, k)}[kind]
    decay = None if of is None else -0.05 - 3 * torch.rand(of) ** 4
    given = dict(q=q.to(dtype), k=key.to(dtype), v=v.to(dtype), log_decay=decay, initial=torch.randn(b, h, k, p))
    if around:
        given |= dict(dt=torch.rand(b, t, h).to(dtype), D=torch.randn((h,) if kind in ("head", "step") else (h, p)))
    return {name: x for name, x in given.items() if x is not None}


def weights_of(given: dict[str, Any]) -> list[torch.Tensor]:
    """What outputs and the final state are multiplied with for a sum."""
    b, t, h, p = given["v"].shape
    return [torch.randn(b, t, h, p).to(given["v"].dtype), torch.randn(b, h, given["q"].shape[3], p)]


def run(given: dict[str, Any], weights: list[torch.Tensor], place: Any = None, **options: Any) -> dict[str, Any]:
    """Return outputs, the final state, and the gradients of their sum with weights."""
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    placed = given if place is None else {name: place(x) for name, x in given.items()}
    y, final = ops.linear_attention(**placed, **options)
    last = weights[1].to(final.dtype)
    gradients = torch.autograd.grad(
        (y, final),
        list(given.values()),
        (weights[0].to(y.dtype), last if place is None else place(last)),
        allow_unused=True,
        materialize_grads=True,
    )
    found = {"y": y, "final": final} | {f"d{n}": d for n, d in zip(given, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def exact(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() for name, x in given.items()}


def check(given: dict[str, Any], found: dict[str, Any], weights: list[torch.Tensor], **options: Any) -> None:
    """Compare with the reference.

    Each result is a sum of products; with every argument replaced by its magnitude it is the sum M of their magnitudes.
    A product meets at most 2 T roundings of decays and eight of other factors, and sums of at most T steps, k keys and
    p values: in any order the whole errs by (3 T + k + p + 8) u M. Where the activations are bfloat16, each factor of a
    product of matrices is rounded to it: scores or a state, what is written or read, and in the gradients of these what
    comes back, six at most in a chain. They err by M times six units, and by less the more there are to sum; float16
    is multiplied as float32 here; on a GPU what is float32 beside it keeps ten bits. What is returned in a narrow type
    is rounded once more. The gradient of a decay is the
    difference of two sums, of the sensitivity to outputs and to values: of all magnitudes, each of them. Where a decay
    is of a head, what stands on both sides is the same number, formed in float32 alike: what is rounded to bfloat16 is
    of the M that passes through the decay. Where it is of a channel, both sides are rounded by themselves.
    """
    b, t, _, _ = given["v"].shape
    k, p = given["q"].shape[3], given["v"].shape[3]
    wanted = run(exact(given), weights, backend="reference", **options)
    magnitudes = {name: x if name == "log_decay" else x.abs() for name, x in exact(given).items()}
    size = run(magnitudes, [w.abs() for w in weights], backend="reference", **options)
    narrow = any(given[name].dtype == torch.bfloat16 for name in "qkv")
    everything = torch.einsum("bthp,bthp->bh", weights[0].double().abs(), size["y"])
    everything += torch.einsum("bhkp,bhkp->bh", weights[1].double().abs(), size["final"])
    sums = dict(size)
    if "log_decay" in given:
        g = given["log_decay"]
        sums["dlog_decay"] = 2 * (
            t * everything.sum(0) if g.ndim == 1 else everything.view(b, 1, -1, *[1] * (g.ndim - 3))
        )
        if g.ndim == 4:
            size["dlog_decay"] = sums["dlog_decay"]
    for name, x in found.items():
        like = given.get(name.removeprefix("d"), given["v"] if name == "y" else size["final"].float())
        assert x.shape == wanted[name].shape and x.dtype == like.dtype, name
        bound = (3 * t + k + p + 8) * 2.0**-24 * sums[name] + (6 * 2.0**-8 if narrow else 0) * size[name]
        bound += UNIT[x.dtype] * wanted[name].abs() if x.dtype != torch.float32 else 0
        error = (x.double() - wanted[name]).abs()
        assert (error <= bound).all(), (name, (error / bound).max().item())


@pytest.mark.interpreted
@pytest.mark.skipif(not _triton.interpreted, reason="needs TRITON_INTERPRET=1")
class TestInterpreted:
    @pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
    def test_equals_the_reference(self, kind: str, shape: tuple[int, ...]) -> None:
        given, options = arguments(kind, shape), flags("start" if shape[1] in (17, 35) else "", *shape[:2])
        weights = weights_of(given)
        found = run(given, weights, backend="triton", **options)
        check(given, found, weights, **options)
        if options and kind in ("step", "channel"):
            assert not found["dlog_decay"][options["start"]].any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", ["step", "channel"])
    def test_narrow_types(self, kind: str, dtype: torch.dtype) -> None:
        given = arguments(kind, (1, 33, 1, 1, 5, 7), dtype)
        given["initial"] = given["initial"].to(dtype)
        weights = weights_of(given)
        check(given, run(given, weights, backend="triton"), weights)

    def test_what_is_kept_has_the_type_that_is_promised(self) -> None:
        """In bfloat16, if the activations are; traced, the op must say so."""
        for dtype in (torch.bfloat16, torch.float16):
            given = arguments("step", (1, 33, 1, 1, 5, 7), dtype)
            names = ("q", "k", "v", "log_decay", "initial", "dt", "D")
            narrow = _fused.narrow("triton", given["q"], given["k"], given["v"], given["log_decay"])
            ordered = (*(given[n] for n in names), None, False, 32, narrow, "triton")
            found = torch.ops.longstate.written_linear_attention(*ordered)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in ordered]
                promised = torch.ops.longstate.written_linear_attention(*fakes)
            for x, y in zip(found, promised, strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
            assert found[2].dtype == (dtype if narrow else torch.float32) and narrow == (dtype == torch.bfloat16)

    def test_float16_beyond_its_range(self) -> None:
        """States and scores may be larger than any float16."""
        given = arguments("none", (1, 20, 1, 2, 5, 7), torch.float16, around=False)
        given |= dict(q=given["q"] / 2**11, k=given["k"] * 2**9, v=given["v"] * 2**8)
        given["initial"] = given["initial"].half()
        weights = weights_of(given)
        found = run(given, weights, backend="triton")
        assert found["final"].abs().max() > 2**17
        found = {name: x for name, x in found.items() if x.isfinite().all()}
        assert set(found) >= {"y", "final", "dinitial", "dv", "dk"}
        check(given, found, weights)

    @pytest.mark.parametrize("kind", ["none", "step", "channel"])
    def test_one_step_without_gradient(self, kind: str) -> None:
        for shape, marks in [((2, 1, 2, 4, 5, 7), "start"), ((1, 1, 1, 2, 17, 18), "")]:
            given, options = arguments(kind, shape), flags(marks, *shape[:2])
            before = given["initial"].clone()
            y, final = ops.linear_attention(**given, backend="triton", **options)
            wanted, wanted_final = ops.linear_attention(**exact(given), backend="reference", **options)
            torch.testing.assert_close(y, wanted.float(), rtol=3e-6, atol=3e-6)
            torch.testing.assert_close(final, wanted_final.float(), rtol=1e-6, atol=1e-6)
            assert torch.equal(given["initial"], before)

    @pytest.mark.parametrize(("kind", "marks"), [("step", "start"), ("channel", "start")])
    def test_odd_layouts_and_poisoned_memory(self, kind: str, marks: str) -> None:
        """Nothing is read that was not given or written, and the same numbers come out each time."""
        from ops.test_cpu_fuzz import layout

        given, options, r = arguments(kind, (2, 17, 1, 1, 3, 4)), flags(marks, 2, 17), random.Random(0)
        weights = weights_of(given)
        with poisoned_memory():
            found = run(given, weights, lambda x: layout(r, x), backend="triton", **options)
        check(given, found, weights, **options)

    @pytest.mark.parametrize("kind", ["step", "channel"])
    def test_strong_decays_do_not_hide_small_ones(self, kind: str) -> None:
        """A sum that holds −80 has no digits left for −10⁻⁶ in float32."""
        given = arguments(kind, (1, 20, 1, 1, 4, 4), around=False)
        decay = torch.full_like(given["log_decay"], -1e-5)
        decay[:, ::5] = -80
        given["log_decay"] = decay
        weights = weights_of(given)
        found = run(given, weights, backend="triton")
        for name, x in run(exact(given), weights, backend="reference").items():
            assert (found[name] - x).abs().max() <= 1e-6 * x.abs().max() + 1e-30, name

    @pytest.mark.parametrize("kind", ["step", "channel"])
    def test_segments_and_pieces_equal_the_whole(self, kind: str) -> None:
        given = arguments(kind, (1, 75, 1, 1, 3, 4))
        y, final = ops.linear_attention(**given, backend="triton")  # several segments
        with poisoned_memory():
            first, state = self.part(given, slice(0, 21), given["initial"])
            second, state = self.part(given, slice(21, 75), state)
        torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)

    @staticmethod
    def part(given: dict[str, Any], at: slice, initial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: x if name == "D" else x[:, at] for name, x in given.items() if name != "initial"}
        return ops.linear_attention(**inputs, initial=initial, backend="triton")

    @pytest.mark.parametrize("kind", ["step", "channel"])
    def test_a_start_forgets_what_is_no_number(self, kind: str) -> None:
        for length in (1, 17):
            given = arguments(kind, (1, length, 1, 1, 3, 4))
            given["initial"] = torch.full_like(given["initial"], float("nan"))
            start = torch.zeros(1, length, dtype=torch.bool)
            start[:, 0] = True
            y, final = ops.linear_attention(**given, start=start, backend="triton")
            assert y.isfinite().all() and final.isfinite().all()


@pytest.mark.compiled
@pytest.mark.skipif(_triton.interpreted, reason="needs Triton's compiler")
@pytest.mark.parametrize("kind", ["step", "channel"])
def test_the_kernels_compile_for_a_gpu(kind: str) -> None:
    """With registers enough, for layers of Mamba-2 and of gated linear attention."""
    pytest.importorskip("triton")
    from longstate.ops.linear_attention import triton as kernels
    from targets import compiling, resources

    b, t, g, h, k, p = (8, 1024, 1, 24, 128, 64) if kind == "step" else (4, 1024, 4, 4, 128, 256)
    q, v = torch.empty(b, t, g, k, dtype=torch.bfloat16), torch.empty(b, t, h, p, dtype=torch.bfloat16)
    given = (q, q, v, torch.empty((b, t, h) if kind == "step" else (b, t, h, k)))
    around = (None, None, None) if kind == "channel" else (torch.empty(b, t, h), torch.empty(h), None)
    with compiling() as found:
        narrow = kind == "step"
        keep = 128 if narrow else 512
        _, final, kept = kernels.linear_attention(*given, None, *around, False, keep, narrow)
        kernels.linear_attention_backward(v, final, *given, *around, kept, False, keep)
    ours = {"gradients"} if kind == "step" else {"value_gradients", "key_gradients"}
    assert {"walk", *ours} <= {x.name for x in found}
    for binary in found:
        spilled = 8 if binary.name == "gradients" else 0  # two numbers of a program's place
        assert any(f"STACK:{n} " in resources(binary) for n in (0, spilled)), (binary.name, resources(binary))
        assert binary.shared < 227 * 1024
