"""What becomes one kernel on a GPU, and what is refused because no kernel computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longstate.ops import _triton
from longstate.ops._program import Place, Product, Program, Unfit
from longstate.ops._program_triton import Launches

pytestmark = pytest.mark.interpreted
if not _triton.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

FLOAT = torch.float32
NORM = dict(eps=1e-5, groups=1, offset=0.0, norm_before_gate=False)


def linear(p: Program, x: Place, outputs: int = 8) -> Place:
    return p.linear(x, Product(torch.ones(outputs, x.width), None, None))


def short(p: Program, u: Place, taps: int = 3) -> Place:
    return p.short_convolution(u, torch.ones(u.width, taps), None, p.carried(FLOAT))


def add(p: Program, x: Place, z: Place) -> None:
    p.add(x, z, 1.0, p.given(x.width, FLOAT))


def attention(p: Program, x: Place, dt: Place, decay: Place) -> Place:
    return p.linear_attention(x, x, x, decay, dt, torch.ones(2), 1, p.carried(FLOAT))


def steps(p: Program, x: Place) -> tuple[Place, Place]:
    return p.head_steps(x, torch.ones(x.width), torch.ones(x.width), (0.0, 1.0))


def launches(write: Callable[[Program, Place], Any]) -> Launches:
    p = Program(2)
    source = p.given(8, FLOAT)
    write(p, source)
    return Launches(p, source)


def test_a_norm_of_two_products_is_in_both() -> None:
    def two(p: Program, x: Place) -> None:
        normed = p.rms_norm(x, None, **NORM)
        linear(p, normed)
        linear(p, normed)

    x = torch.randn(2, 1, 8)
    made = launches(two)
    assert len(made._launches) == 2
    assert torch.allclose(
        made.run(x, ()), torch.nn.functional.rms_norm(x, (8,), eps=1e-5).sum(-1, True).expand(x.shape)
    )


def test_a_norm_of_which_a_product_takes_a_part_stands_alone() -> None:
    def part(p: Program, x: Place) -> None:
        linear(p, p.rms_norm(x, None, **NORM).split([5, 3])[1])

    x = torch.randn(2, 1, 8)
    made = launches(part)
    assert len(made._launches) == 2
    wanted = torch.nn.functional.rms_norm(x, (8,), eps=1e-5)[..., 5:].sum(-1, True)
    assert torch.allclose(made.run(x, ()), wanted.expand(x.shape))


def test_a_product_of_a_sum_is_written_only_where_it_is_added() -> None:
    def both(p: Program, x: Place) -> None:
        add(p, x, linear(p, x))

    x = torch.randn(2, 1, 8)
    made = launches(both)
    assert len(made._launches) == 1
    assert torch.allclose(made.run(x, ()), x + x.sum(-1, True))


REFUSED: dict[str, Callable[[Program, Place], Any]] = {
    "of no product": lambda p, x: short(p, x),
    "too many taps": lambda p, x: short(p, linear(p, x), 17),
    "convolved, and read as it was": lambda p, x: [add(p, y, short(p, y)) for y in [linear(p, x)]],
    "convolved, and a part read that reaches into it": lambda p, x: [
        (short(p, y.split([4, 4])[1]), linear(p, y.split([3, 2, 3])[1])) for y in [linear(p, x)]
    ],
    "convolved twice": lambda p, x: [(short(p, y), short(p, y)) for y in [linear(p, x)]],
    "a sum of no product": lambda p, x: add(p, x, x),
    "a sum of a product that is read once more": lambda p, x: [(add(p, x, y), linear(p, y)) for y in [linear(p, x)]],
    "steps that a product reads": lambda p, x: linear(p, steps(p, x)[0]),
    "attention of other steps": lambda p, x: attention(p, x, *x.split([2, 2, 4])[:2]),
    "attention of other decays": lambda p, x: attention(p, x, steps(p, y)[0], y) if (y := x.split([2, 6])[0]) else None,
}


@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_computes_is_refused(write: Callable[[Program, Place], Any]) -> None:
    with pytest.raises(Unfit):
        launches(write)


def test_columns_beside_a_convolution_may_be_read() -> None:
    def beside(p: Program, x: Place) -> None:
        left, right = linear(p, x).split([4, 4])
        linear(p, short(p, right), 3)
        linear(p, left, 3)

    x = torch.randn(2, 1, 8)
    made = launches(beside)
    window = torch.zeros(2, 2, 4)
    assert torch.allclose(made.run(x, (window,)), 4 * x.sum(-1, True).expand(2, 1, 3), atol=1e-5)
    assert torch.allclose(window[:, 1], x.sum(-1).expand(2, 4), atol=1e-5) and not window[:, 0].any()
