"""One token through Mamba in one call of compiled kernels: what the mixer's own lines give, or not taken at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from longstate import native
from longstate.mixers import Mamba
from longstate.mixers import mamba as module
from longstate.mixers.mamba import MambaState
from longstate.timeline import Timeline

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)


@contextmanager
def steps_taken(monkeypatch: pytest.MonkeyPatch, take: bool = True) -> Iterator[list[int]]:
    """Count the calls; or let none happen."""
    taken: list[int] = []
    before, takes = module.mamba_step, module.takes
    with monkeypatch.context() as patch:
        patch.setattr(module, "mamba_step", lambda *given: (taken.append(1), before(*given))[1])
        patch.setattr(module, "takes", lambda *given: take and takes(*given))
        yield taken


def case(batch: int, dtype: torch.dtype = torch.float32, d_model: int = 24, **options: Any) -> tuple[Any, ...]:
    mixer = Mamba(d_model, **options).to(dtype)
    x = torch.randn(batch, 6, d_model).to(dtype)
    with torch.no_grad():
        _, state = mixer(x[:, :5])
    return mixer, x[:, 5:].contiguous(), state


@pytest.mark.parametrize("options", [{}, {"d_state": 5, "d_conv": 3}, {"bias": True, "conv_bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_it_is_the_same(
    batch: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    """The same kernels in the same order give the same bits. In bfloat16 the projection of Δ is rounded between its
    product and its bias, but not here: Δ, so the state, and outputs differ by that rounding of 2^-9."""
    mixer, x, state = case(batch, dtype, **options)
    before = [y.clone() for y in state]
    with torch.no_grad():
        with steps_taken(monkeypatch) as taken:
            got, after = mixer(x, state)
        assert taken
        with steps_taken(monkeypatch, take=False):
            wanted, after_wanted = mixer(x, state)
    assert all(torch.equal(y, z) for y, z in zip(state, before, strict=True)), "a state is a value"
    bound = 0.0 if dtype is torch.float32 else 2**-6
    for y, z in zip((got, *after), (wanted, *after_wanted), strict=True):
        assert y.shape == z.shape and y.dtype == z.dtype and z.abs().max() > 0
        torch.testing.assert_close(y, z, rtol=bound, atol=bound * z.abs().max().item())


def test_who_looks_on_gets_the_mixers_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, hooks, adapters, norms, marks and longer inputs: nothing of them may be passed over."""
    mixer, x, state = case(2)
    with steps_taken(monkeypatch) as taken:
        mixer(x, state)[0].sum().backward()
        assert mixer.in_proj.weight.grad is not None
        with torch.no_grad():
            seen: list[int] = []
            for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
                hook = getattr(mixer, name).register_forward_hook(lambda *_: seen.append(1))
                mixer(x, state)
                hook.remove()
            assert len(seen) == 5
            hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
            mixer(x, state)
            hook.remove()
            for start in (Timeline(start=torch.ones(2, 1, dtype=torch.bool)), Timeline(dt=torch.ones(2, 1))):
                mixer(x, state, start)
            mixer(x.expand(2, 2, -1), state)
            mixer(x)
            mixer(x.repeat(5, 1, 1), MambaState(*(y.repeat(5, 1, 1) for y in state)))  # more than the kernel takes
            with torch.autocast("cpu", torch.bfloat16):
                mixer(x, state)
            for inner_norm in ("plain", "weighted"):
                normed, y, after = case(2, inner_norm=inner_norm)
                normed(y, after)
            mixer.x_proj = torch.nn.Sequential(mixer.x_proj)
            mixer(x, state)
    assert not taken


def test_threads_change_no_bit() -> None:
    mixer, x, state = case(2, d_model=200)
    before, found = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y, after = mixer(x, state)
                found.append((y, *after))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(y, z) for y, z in zip(found[0], others, strict=True))
