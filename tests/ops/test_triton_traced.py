"""The ops with their GPU kernels, traced: compiled without a break, with gradients, and exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from ops.test_against_reference import (
    delta_case,
    largest_error,
    linear_case,
    run,
    scan_case,
    selective_case,
    short_case,
)

pytestmark = pytest.mark.interpreted
if not _triton.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def norm_case(kind: str, batch: int, length: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, gate = (torch.randn(batch, length, 6, dtype=dtype) for _ in range(2))

    def two(**given: Any) -> Any:  # as the others, which give a state too
        y = ops.rms_norm(**given)
        return y, y[:, -1]

    return two, dict(x=x, weight=torch.randn(6, dtype=dtype), gate=gate)


def powers_case(kind: str, batch: int, length: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    def two(weights: torch.Tensor, log_base: torch.Tensor, **options: Any) -> Any:
        y = ops.vandermonde(torch.view_as_complex(weights), torch.view_as_complex(log_base), length, **options)
        return y, y[:, -1]

    base = torch.stack([-torch.rand(3, 4), torch.randn(3, 4)], -1).double()
    return two, dict(weights=torch.randn(3, 4, 2, dtype=dtype), log_base=base)


TRACED = [
    (scan_case, "step"),
    (selective_case, "zoh-euler"),
    (linear_case, "groups step strong"),
    (linear_case, "channel"),
    (delta_case, "step"),
    (short_case, ""),
    (norm_case, ""),
    (powers_case, ""),
]


@pytest.mark.parametrize(("make", "kind"), TRACED, ids=[f"{x.__name__} {kind}" for x, kind in TRACED])
def test_compiled_without_a_break_and_exported(make: Callable[..., Any], kind: str) -> None:
    function, arguments = make(kind, 1, 3, torch.float32)
    function = partial(function, backend="triton")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert largest_error(run(compiled, arguments), run(function, arguments)) == 0
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    others = {name: x for name, x in arguments.items() if name not in tensors}

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, torch.Tensor]) -> Any:
            return function(**tensors, **others)

    exported = torch.export.export(Module(), (tensors,)).module()(tensors)
    assert largest_error(list(exported), list(function(**arguments))) == 0
