"""Gradients of compiled kernels of which only some results are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longstate import native, ops

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

LENGTH = 300  # more than two tiles of any kernel


def scan() -> tuple[Callable[..., Any], list[Tensor]]:
    u, dt, B, C = (
        torch.randn(1, LENGTH, 5),
        torch.rand(1, LENGTH, 5),
        torch.randn(1, LENGTH, 3),
        torch.randn(1, LENGTH, 3),
    )
    return ops.selective_scan, [u, dt, -torch.rand(5, 3), B, C, torch.randn(5)]


def attention() -> tuple[Callable[..., Any], list[Tensor]]:
    q, k = torch.randn(1, LENGTH, 1, 5), torch.randn(1, LENGTH, 1, 5)
    return ops.linear_attention, [q, k, torch.randn(1, LENGTH, 2, 3), -torch.rand(1, LENGTH, 2)]


def delta() -> tuple[Callable[..., Any], list[Tensor]]:
    q, k = torch.randn(1, LENGTH, 2, 5), torch.nn.functional.normalize(torch.randn(1, LENGTH, 2, 5), dim=-1)
    return ops.delta_rule, [q, k, torch.randn(1, LENGTH, 2, 3), torch.rand(1, LENGTH, 2), -torch.rand(1, LENGTH, 2)]


@pytest.mark.parametrize("op", [scan, attention, delta])
@pytest.mark.parametrize("used", ["outputs", "state", "both"])
def test_what_is_not_used_counts_as_zero(op: Callable[[], Any], used: str) -> None:
    function, given = op()
    found = []
    for backend, dtype in (("cpu", torch.float32), ("chunked", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in given]
        y, final = function(*inputs, backend=backend)
        loss = (y.sin().sum() if used != "state" else 0) + (final.cos().sum() if used != "outputs" else 0)
        found.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    for x, wanted in zip(*found, strict=True):
        torch.testing.assert_close(x.double(), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("op", [scan, attention, delta])
def test_no_zeros_are_made_for_states_that_are_kept(op: Callable[[], Any]) -> None:
    function, given = op()
    inputs = [x.requires_grad_() for x in given]
    y, final = function(*inputs, backend="cpu")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        y.sum().backward()
    zeroed = [event.input_shapes[0] for event in seen.events() if event.name == "aten::zero_"]
    kept = [shape for shape in zeroed if shape[1:] == list(final.shape)]
    assert kept == [] and list(final.shape) not in zeroed
