"""Whether one token runs as a program: each condition alone, on a model that has just run as one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longstate import Mamba, native
from longstate.mixers._parts import RMSNorm
from longstate.mixers._step import Watch
from longstate.models import _one_token
from longstate.models.channels import GatedMLP
from longstate.models.stack import Block, Stack

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

from models.test_one_token import case, programs_run, tensors

# What is refused by an op, or by the run-time checks before it.
ERRORS = (RuntimeError, TypeError, ValueError)


class Odd(torch.Tensor):
    """A tensor that may be anything: a subclass has its own say in every operation."""


def taken_now(model: Stack, x: torch.Tensor, state: Any, monkeypatch: pytest.MonkeyPatch, bound: float = 0.0) -> int:
    """Run one token; return how many layers were programs, of which nobody must be able to tell."""
    with torch.no_grad():
        with programs_run(monkeypatch) as taken:
            got, after = model(x, state)
        with programs_run(monkeypatch, run=False):
            wanted, after_wanted = model(x, state)
    for y, z in zip((got, *tensors(after)), (wanted, *tensors(after_wanted)), strict=True):
        assert y.dtype is z.dtype
        torch.testing.assert_close(y, z, rtol=bound, atol=bound)
    return len(taken)


def again(change: Callable[[Stack], Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Return how many layers are programs after a change to a model that was all programs."""
    bound = 2**-19 if options.get("mixer") else 0.0
    model, x, state = case(2, **options)
    assert taken_now(model, x, state, monkeypatch, bound) == 2
    before = model(x, state)[0]
    with torch.no_grad():
        change(model)
    state = state if len(model.layers) == 2 else (*state, state[0])
    assert not torch.equal(model(x, state)[0], before), "a change that nobody sees tests nothing"
    return taken_now(model, x, state, monkeypatch, bound)


class Doubled(nn.Identity):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


class DoubledNorm(RMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * super().forward(x, gate)


class DoubledMamba(Mamba):
    def forward(self, x: torch.Tensor, state: Any = None, timeline: Any = None) -> Any:
        y, state = super().forward(x, state, timeline)
        return 2 * y, state


class DoubledBlock(Block):
    def forward(self, residual: torch.Tensor, state: Any, timeline: Any) -> Any:
        residual, state = super().forward(residual, state, timeline)
        return 2 * residual, state


def set_class(owner: Callable[[Any], nn.Module], kind: type[nn.Module]) -> Callable[[Stack], None]:
    """Return a change that puts a copy of another class in the place of a module, behind its back."""

    def change(model: Stack) -> None:
        module = owner(model)
        other = copy.copy(module)
        other.__class__ = kind
        for inner in model.modules():
            for name, found in inner._modules.items():
                if found is module:
                    inner._modules[name] = other

    return change


def with_mlp(model: Stack) -> None:
    block = model.layers[0]
    block.norm2, block.mlp = RMSNorm(24), GatedMLP(24)


CHANGES: list[tuple[Callable[[Stack], Any], int, dict[str, Any]]] = [
    (lambda model: setattr(model.layers[0].norm, "offset", 1.0), 2, {}),
    (lambda model: setattr(model.layers[0].norm, "groups", 2), 2, {}),
    (lambda model: setattr(model.layers[0].mixer.norm, "norm_before_gate", True), 2, {"mixer": "mamba2"}),
    (lambda model: setattr(model.layers[0].mixer.conv1d, "activation", None), 1, {}),
    (lambda model: setattr(model, "layers", nn.ModuleList(copy.deepcopy(list(model.layers)[::-1]))), 2, {}),
    (lambda model: model.layers.append(copy.deepcopy(model.layers[0])), 3, {}),
    (with_mlp, 1, {}),
    (lambda model: setattr(model, "norm_f", nn.LayerNorm(24)), 2, {}),
    (lambda model: setattr(model.layers[0], "norm", nn.LayerNorm(24)), 1, {}),
    (set_class(lambda model: model.layers[0].mixer.dt_norm, Doubled), 1, {}),
    (set_class(lambda model: model.layers[0].norm, DoubledNorm), 1, {}),
    (set_class(lambda model: model.layers[0].mixer, DoubledMamba), 1, {}),
    (set_class(lambda model: model.layers[0], DoubledBlock), 1, {}),
]


@pytest.mark.parametrize(("change", "programs", "options"), CHANGES)
def test_a_changed_model_is_another(
    change: Callable[[Stack], Any], programs: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert again(change, monkeypatch, **options) == programs


def test_weights_in_the_place_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are watched as parameters are; an attribute that is neither is not read at all."""
    model, x, state = case(2)
    assert taken_now(model, x, state, monkeypatch) == 2
    before = model(x, state)[0]
    product = model.layers[0].mixer.in_proj
    weight = product.weight.detach()
    del product.weight
    product.register_buffer("weight", weight)
    assert taken_now(model, x, state, monkeypatch) == 2
    product.weight = 2 * weight
    assert taken_now(model, x, state, monkeypatch) == 2 and not torch.equal(model(x, state)[0], before)
    product.weight = weight.as_subclass(Odd)
    assert taken_now(model, x, state, monkeypatch) == 1
    for owner, name in ((product, "weight"), (model.layers[1].norm, "weight")):
        plain = getattr(owner, name).detach().as_subclass(torch.Tensor).clone()
        delattr(owner, name)
        setattr(owner, name, plain)
    assert taken_now(model, x, state, monkeypatch) == 0


def test_weights_that_are_no_plain_tensors_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, state = case(2)
    mixer = model.layers[0].mixer
    plain = mixer.D
    mixer.D = nn.Parameter(plain.detach().as_subclass(Odd))
    assert taken_now(model, x, state, monkeypatch) == 1
    mixer.D = nn.Parameter(plain.detach().to("meta"))
    with programs_run(monkeypatch) as taken, torch.no_grad(), pytest.raises(ERRORS):
        model(x, state)[0].sum().item()
    assert not taken


def test_programs_are_kept_for_each_number_of_sequences() -> None:
    model, x, state = case(2)
    one = tuple(type(layer)(*(y[:1] for y in layer)) for layer in state)
    with torch.no_grad():
        model(x, state), model(x[:1], one)
        kept = dict(_one_token._KEPT[model])
        model(x, state), model(x[:1], one)
    assert set(kept) == {(1, False), (2, False)} and all(
        _one_token._KEPT[model][n] is programs for n, programs in kept.items()
    )


def test_hooks_elsewhere_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, state = case(1)
    found: list[int] = []
    own = Watch._find
    monkeypatch.setattr(Watch, "_find", lambda self: (found.append(1), own(self))[1])
    with torch.no_grad():
        model(x, state)
        found.clear()
        nn.Identity().register_forward_hook(lambda *_: None)
        for _ in range(3):
            model(x, state)
    assert len(found) == 1


@pytest.mark.parametrize(("width", "team"), [(24, 1), (200, 2)])
def test_threads_of_a_small_model_and_of_a_large_one(width: int, team: int) -> None:
    before = torch.get_num_threads()
    model, x, state = case(1, d_model=width)
    try:
        with torch.no_grad():
            model(x, state)
            torch.set_num_threads(2)
            model(x, state)
    finally:
        torch.set_num_threads(before)
    programs = _one_token._KEPT[model][1, False]
    assert (programs.threads, programs.team, programs.normed) == (2, team, torch.float32)


def test_states_that_programs_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, strided ones, of another type, of a class of their own, and of no memory at all."""
    model, x, state = case(2)
    assert taken_now(model, x, state, monkeypatch) == 2
    first = state[0]
    with torch.no_grad(), programs_run(monkeypatch) as taken:
        wanted = model(x, (model.layers[0].initial_state(2), state[1]))[0]
        taken.clear()
        torch.testing.assert_close(model(x, (None, state[1]))[0], wanted)
        assert not taken
    others = [
        first._replace(ssm=first.ssm.mT.contiguous().mT),
        first._replace(ssm=first.ssm.bfloat16()),
        first._replace(ssm=first.ssm.as_subclass(Odd)),
    ]
    for other in others:
        assert taken_now(model, x, (other, state[1]), monkeypatch, 1e-5) == 0
    with torch.no_grad(), programs_run(monkeypatch) as taken, pytest.raises(ERRORS):
        model(x, (first._replace(ssm=first.ssm.to("meta")), state[1]))[0].sum().item()
    assert not taken


def test_inputs_that_programs_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them, of another type or class, of no memory, of another width; strided ones are as good as any."""
    model, x, state = case(2)
    assert taken_now(model, x, state, monkeypatch) == 2
    assert taken_now(model, x.squeeze(1).mT.contiguous().mT.unsqueeze(1), state, monkeypatch) == 2
    assert taken_now(model, x.as_subclass(Odd), state, monkeypatch) == 0
    none = tuple(type(layer)(*(y[:0] for y in layer)) for layer in state)
    assert taken_now(model, x[:0], none, monkeypatch) == 0
    with torch.no_grad(), programs_run(monkeypatch) as taken:
        for other in (x[..., :-1].contiguous(), x.to("meta")):
            with pytest.raises(ERRORS):
                model(other, state)[0].sum().item()
    assert not taken
    double, x, state = case(2, torch.float64)
    for block in double.layers:
        block.norm = nn.Identity()
    assert taken_now(double, x, state, monkeypatch) == 0


def test_a_residual_stream_narrower_than_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is wider than the stream was; and programs for one type are none for another."""
    model = Stack(24, ["mamba", "mamba"], residual_in_fp32=False).eval()
    x, state = torch.randn(2, 1, 24), model.initial_state(2)
    assert taken_now(model, x, state, monkeypatch) == 2
    assert taken_now(model, x.bfloat16(), state, monkeypatch) == 0
    assert taken_now(model, x, state, monkeypatch) == 2


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, state = case(2)
    assert taken_now(model, x, state, monkeypatch) == 2
    with torch.no_grad(), programs_run(monkeypatch) as taken, Seen() as seen:
        model(x, state)
    assert not taken and sum("selective_scan" in name for name in seen.names) == 2


def test_what_a_layer_between_programs_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook may give back strided numbers, fewer rows, or none in memory."""
    model = Stack(24, ["mamba", {"mixer": "attention", "n_heads": 2}, "mamba"]).eval()
    x, state = torch.randn(2, 1, 24), model.initial_state(2)
    gives: list[Any] = [lambda y: y[:1], lambda y: y.to("meta"), lambda y: y.squeeze(1).mT.contiguous().mT.unsqueeze(1)]
    model.layers[1].register_forward_hook(lambda _, __, found: (gives[-1](found[0]), found[1]))
    assert taken_now(model, x, state, monkeypatch) == 2
    while gives.pop() and gives:
        with torch.no_grad(), pytest.raises(ERRORS):
            model(x, state)[0].sum().item()


def test_nothing_to_run_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without kernels nor without layers that have any."""
    model, x, state = case(2)
    with torch.no_grad():
        assert _one_token.one_token(model, x, state, None) is not None
        monkeypatch.setattr(_one_token._program_cpu, "there", lambda: False)
        assert _one_token.one_token(model, x, state, None) is None
        monkeypatch.undo()
        other = Stack(24, [{"mixer": "attention", "n_heads": 2}]).eval()
        assert _one_token.one_token(other, x, other.initial_state(2), None) is None


@pytest.mark.compiled
def test_one_token_of_any_number_of_sequences_is_exported() -> None:
    """Tracing is told before anything is asked of sizes: an answer would be a promise about them."""
    model = Stack(24, ["mamba"]).eval()
    batch = torch.export.Dim("b", min=2)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, conv: torch.Tensor, ssm: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.model(x, (type(state)(conv, ssm),))[0]
            return y

    (state,) = model.initial_state(3)
    with torch.no_grad():
        program = torch.export.export(Module(), (torch.randn(3, 1, 24), *state), dynamic_shapes=[{0: batch}] * 3)
        x, (state,) = torch.randn(20, 1, 24), model.initial_state(20)
        torch.testing.assert_close(program.module()(x, *state), model(x, (state,))[0])
