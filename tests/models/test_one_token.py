"""One token through a block in one call of compiled kernels: what the block's own lines give, or not taken at all."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from longstate import LanguageModel, native
from longstate.compression import quantize
from longstate.models import _one_token, stack
from longstate.models.stack import Stack
from longstate.timeline import Timeline

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)


@contextmanager
def programs_run(monkeypatch: pytest.MonkeyPatch, run: bool = True) -> Iterator[list[int]]:
    """Count the blocks that were run as programs; or let none be."""
    taken: list[int] = []

    def counted(*given: Any) -> Any:
        found = before(*given) if run else None
        programs = _one_token._KEPT.get(given[0], {}).get((len(given[1]), False))
        taken.extend([1] * sum(layer is not None for layer in programs.layers) if found else [])
        return found

    before = stack.one_token
    with monkeypatch.context() as patch:
        patch.setattr(stack, "one_token", counted)
        yield taken


def case(batch: int, dtype: torch.dtype = torch.float32, d_model: int = 24, **options: Any) -> tuple[Any, ...]:
    layer = {"mixer": "mamba"} | options
    if layer["mixer"] == "mamba2":
        layer = {"d_state": 16, "head_dim": 8} | layer
    model = Stack(d_model, [layer] * 2, residual_multiplier=0.5 if dtype is torch.float32 else 1.0).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        x = torch.randn(batch, 6, d_model).to(dtype)
        _, state = model(x[:, :5])
    return model, x[:, 5:].contiguous(), state


def tensors(state: Any) -> list[torch.Tensor]:
    return [x for layer in state for x in layer]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"d_state": 5, "d_conv": 3},
    {"bias": True, "conv_bias": False},
    {"inner_norm": "plain"},
    {"inner_norm": "weighted"},
    {"mixer": "mamba2"},
    {"mixer": "mamba2", "n_groups": 2, "skip_per_channel": True, "bias": True, "d_conv": 2},
    {"mixer": "mamba2", "d_state": 5, "dt_limit": (0.01, 0.02), "norm_before_gate": True, "norm_groups": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_it_is_the_same(
    batch: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    """The same kernels in the same order give the same bits. In bfloat16 the projection of Δ is rounded between its
    product and its bias, but not here: Δ, so the state, and outputs differ by that rounding of 2^-9, and by as much
    again where what follows is rounded to another neighbour. Mamba-2's Δ and decay are of other elementary functions
    than torch's, 2 units of 2^-24 apart, which two layers and their norms multiply by no more than 2^4."""
    model, x, state = case(batch, dtype, **options)
    before = [y.clone() for y in tensors(state)]
    with torch.no_grad():
        with programs_run(monkeypatch) as taken:
            got, after = model(x, state)
        assert len(taken) == 2
        with programs_run(monkeypatch, run=False):
            wanted, after_wanted = model(x, state)
    assert all(torch.equal(y, z) for y, z in zip(tensors(state), before, strict=True)), "a state is a value"
    bound = 2**-6 if dtype is torch.bfloat16 else 2**-19 if options.get("mixer") else 0.0
    for y, z in zip((got, *tensors(after)), (wanted, *tensors(after_wanted)), strict=True):
        assert y.shape == z.shape and y.dtype == z.dtype and z.abs().max() > 0
        torch.testing.assert_close(y, z, rtol=bound, atol=bound * z.abs().max().item())


def test_who_looks_on_gets_the_blocks_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, hooks, adapters, marks and longer inputs: nothing of them may be passed over, neither before a program
    was made nor after."""
    seen: list[int] = []
    for first in (False, True):
        seen.clear()
        model, x, state = case(2)
        with torch.no_grad():
            if first:
                model(x, state)
        with programs_run(monkeypatch) as taken:
            model(x, state)[0].sum().backward()
            block = model.layers[0]
            assert block.mixer.in_proj.weight.grad is not None
            model.layers = nn.ModuleList([block])
            state = state[:1]
            with torch.no_grad():
                for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
                    hook = getattr(block.mixer, name).register_forward_hook(lambda *_: seen.append(1))
                    model(x, state)
                    hook.remove()
                for module in (block.mixer, block.norm, block):
                    hook = module.register_forward_pre_hook(lambda *_: seen.append(1))
                    model(x, state)
                    hook.remove()
                assert len(seen) == 8
                block.mixer.x_proj.forward = lambda x, own=block.mixer.x_proj.forward: (seen.append(1), own(x))[1]
                model(x, state)
                del block.mixer.x_proj.forward
                assert len(seen) == 9
                hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
                model(x, state)
                hook.remove()
                for timeline in (Timeline(start=torch.ones(2, 1, dtype=torch.bool)), Timeline(dt=torch.ones(2, 1))):
                    model(x, state, timeline)
                model(x.expand(2, 2, -1), state)
                model(x)
                model(
                    x.repeat(5, 1, 1), (type(state[0])(*(y.repeat(5, 1, 1) for y in state[0])),)
                )  # more than it takes
                with torch.autocast("cpu", torch.bfloat16):
                    model(x, state)
                strided = type(state[0])(*(y.mT.contiguous().mT for y in state[0]))
                model(x, (strided,))
                block.mixer.x_proj = nn.Sequential(block.mixer.x_proj)
                model(x, state)
        assert not taken


class Instead:
    """A forward of its own for one module, as who patches a model gives it."""

    def __init__(self, module: nn.Module, see: Any) -> None:
        self.module, own = module, module.forward
        module.forward = lambda *given: (see(), own(*given))[1]

    def remove(self) -> None:
        del self.module.forward


def instead_and_elsewhere(module: nn.Module, see: Any) -> Instead:
    nn.Identity().register_forward_hook(see)  # then hooks are looked for, and not patches alone
    return Instead(module, see)


LOOKING: dict[str, Any] = {
    "after": lambda module, see: module.register_forward_hook(see),
    "before": lambda module, see: module.register_forward_pre_hook(see),
    "instead": Instead,
    "instead, with a hook elsewhere": instead_and_elsewhere,
}


@pytest.mark.parametrize("look", LOOKING.values(), ids=LOOKING)
def test_a_hook_anywhere_in_a_program_is_called(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is put on a model that has just run as a program, and gone when that runs as one again."""
    model, x, state = case(1)
    for module in model.modules():
        if module is model.layers or module is model:  # a list, which nobody calls, and what calls programs
            continue
        seen: list[int] = []
        with torch.no_grad(), programs_run(monkeypatch) as taken:
            model(x, state)
            hook = look(module, lambda *_, seen=seen: seen.append(1))
            model(x, state)
            hook.remove()
            model(x, state)
        assert len(seen) == 1 and len(taken) == 2 + (2 if module is model.norm_f else 1) + 2, type(module)


def test_a_hook_on_all_modules_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, state = case(1)
    seen: list[nn.Module] = []
    with torch.no_grad(), programs_run(monkeypatch) as taken:
        model(x, state)
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        model(x, state)
        hook.remove()
        model(x, state)
    assert set(seen) == set(model.modules()) - {model.layers} and len(taken) == 4


def test_what_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change of a model its next token is that of the changed model."""
    model, x, state = case(1)
    mixer, norm = model.layers[0].mixer, model.layers[0].norm

    def double(owner: Any, name: str) -> None:
        old = getattr(owner, name)
        setattr(owner, name, nn.Parameter(2 * old) if isinstance(old, nn.Parameter) else 2 * old)

    def moved() -> None:
        mixer.A_log.data = mixer.A_log.data + 1

    changes = [
        lambda: double(mixer.in_proj, "weight"),
        lambda: double(mixer.conv1d, "bias"),
        lambda: double(mixer, "D"),
        lambda: double(norm, "weight"),
        lambda: double(norm, "eps"),
        lambda: mixer.out_proj.weight.mul_(2),
        lambda: mixer.dt_proj.load_state_dict({k: 2 * v for k, v in mixer.dt_proj.state_dict().items()}, assign=True),
        moved,
        lambda: setattr(mixer, "x_proj", copy.deepcopy(mixer.out_proj).__class__(48, 34, bias=False)),
        lambda: setattr(model.layers[0], "residual_multiplier", 3.0),
        lambda: model.layers[0].__setattr__("mixer", copy.deepcopy(model.layers[1].mixer)),
    ]
    with torch.no_grad():
        last = model(x, state)[0]
        for change in changes:
            change()
            with programs_run(monkeypatch) as taken:
                got = model(x, state)[0]
            with programs_run(monkeypatch, run=False):
                wanted = model(x, state)[0]
            assert len(taken) == 2 and torch.equal(got, wanted) and not torch.equal(got, last), changes.index(change)
            last = got


def test_other_views_of_the_same_memory_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed weight multiplies as it stands, and what has lost rows is met by the op's own error."""
    model, x, state = case(1, expand=1)
    mixer = model.layers[0].mixer
    with torch.no_grad():
        model(x, state)
        mixer.out_proj.weight.data = mixer.out_proj.weight.data.mT
        got = model(x, state)[0]
        with programs_run(monkeypatch, run=False):
            torch.testing.assert_close(got, model(x, state)[0])
        mixer.out_proj.weight.data = mixer.out_proj.weight.data.mT
        with programs_run(monkeypatch) as taken:
            model(x, state)
        assert len(taken) == 2
        mixer.D.data = mixer.D.data[:1]
        with pytest.raises(Exception, match="D"):
            model(x, state)


@pytest.mark.parametrize("wide", [False, True])
def test_layers_that_are_no_programs_run_between_them(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if what somebody who looks at their calls gives back is of another type."""
    layers = ["mamba2", {"mixer": "attention", "n_heads": 2}, "mamba", {"mixer": "mamba", "mlp": {}}, "mamba"]
    model = Stack(64, layers, residual_in_fp32=False).bfloat16().eval()
    if wide:
        model.layers[1].register_forward_hook(lambda _, given, found: (found[0].float(), found[1]))
    x = torch.randn(2, 6, 64).bfloat16()
    with torch.no_grad():
        _, state = model(x[:, :5])
        with programs_run(monkeypatch) as taken:
            got, after = model(x[:, 5:].contiguous(), state)
        with programs_run(monkeypatch, run=False):
            wanted, after_wanted = model(x[:, 5:].contiguous(), state)
    assert len(taken) == 3 and got.dtype is wanted.dtype
    # As in the test above, and more layers.
    for y, z in zip((got, *tensors(after)), (wanted, *tensors(after_wanted)), strict=True):
        torch.testing.assert_close(y, z, rtol=2**-5, atol=2**-5 * z.abs().max().item())


def test_a_state_that_does_not_fit_is_met_by_the_ops_own_errors() -> None:
    model, x, state = case(1)
    with torch.no_grad():
        model(x, state)
        with pytest.raises(ValueError, match="initial has shape"):
            model(x, (state[0]._replace(conv=state[0].conv[:, :1]), state[1]))


@pytest.mark.parametrize("group", [None, 8], ids=str)
def test_int8(group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, state = case(2)
    quantize(model.requires_grad_(False), "int8", group)
    with torch.no_grad():
        with programs_run(monkeypatch) as taken:
            got = model(x, state)
        with programs_run(monkeypatch, run=False):
            wanted = model(x, state)
    assert len(taken) == 2 and torch.equal(got[0], wanted[0])
    assert all(torch.equal(y, z) for y, z in zip(tensors(got[1]), tensors(wanted[1]), strict=True))


def test_models_are_copied_and_let_go() -> None:
    model = LanguageModel(16, 8, ["mamba"]).eval()
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        model(tokens, model.initial_state(1))
        other = copy.deepcopy(model)
        other(tokens, other.initial_state(1))
    kept = [model.backbone, other.backbone]
    assert all(stack in _one_token._KEPT for stack in kept)
    before = len(_one_token._KEPT)
    del model, other, kept  # programs keep no model alive
    gc.collect()
    assert len(_one_token._KEPT) <= before - 2


def test_threads_change_no_bit() -> None:
    model, x, state = case(2, d_model=200)
    before, found = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y, after = model(x, state)
                found.append((y, *tensors(after)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(y, z) for y, z in zip(found[0], others, strict=True))
