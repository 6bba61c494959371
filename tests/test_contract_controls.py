"""Each check of the contract can fail: mixers broken in one way each, and the check that must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import contract
from longstate import Mixer, Timeline, ops
from longstate.timeline import zero_where_invalid


class ToyState(NamedTuple):
    """One number for each channel."""

    ssm: Tensor


class Toy(Mixer):
    """A leaky integrator for each channel, right but for the defect named."""

    def __init__(self, defect: str = "", d_model: int = 3) -> None:
        super().__init__()
        self.defect, self.d_model = defect, d_model
        self.log_rate = nn.Parameter(torch.empty(d_model))
        self.gain = nn.Parameter(torch.empty(d_model, d_model))
        self.reset_parameters()
        self.calls = 0
        if defect == "weight that is no parameter":
            self.hidden = torch.randn(d_model)
        if defect == "constant left uninitialised":
            self.register_buffer("constant", torch.ones(d_model))

    def reset_parameters(self) -> None:
        generator = None
        if self.defect == "unseeded draws":
            generator = torch.Generator()
            generator.seed()
        if self.defect != "parameter left uninitialised":
            nn.init.normal_(self.gain, generator=generator)
        nn.init.zeros_(self.log_rate)

    def initial_state(self, batch_size: int) -> ToyState:
        if self.defect == "initial state of another type":
            return ToyState(torch.zeros(batch_size, self.d_model, dtype=torch.float32))
        return ToyState(self.gain.new_zeros(batch_size, self.d_model))

    def forward(
        self, x: Tensor, state: ToyState | None = None, timeline: Timeline | None = None
    ) -> tuple[Tensor, ToyState]:
        is_ = self.defect.__eq__
        x, (dt, start, valid) = self._enter(x, timeline)
        if is_("ignores valid"):
            valid = None
        if is_("leaks across starts"):
            start = None
        before = None if state is None or is_("drops the initial state") else state.ssm
        if before is not None and is_("detaches the state"):
            before = before.detach()
        if before is not None and is_("changes the state in place"):
            before.detach().mul_(0.5)
        if before is not None and is_("mixes the batch"):
            before = before + before.mean(0)
        dt = torch.ones_like(x[..., 0]) if dt is None or is_("ignores elapsed time") else dt.to(x.dtype)
        if is_("another step when none is said") and (timeline is None or timeline.dt is None):
            dt = dt * 1.01
        step = (dt[..., None] * self.log_rate.exp()).expand_as(x)
        if valid is not None:
            step = zero_where_invalid(step, valid)
        u = x @ self.gain
        if is_("looks ahead"):
            u = u + torch.cat([u[:, 1:], torch.zeros_like(u[:, :1])], 1)
        if is_("depends on the length"):
            u = u / x.shape[1] if x.shape[1] else u
        if is_("wrong gradient"):
            u = u + 0.1 * u.detach()
        if is_("uninitialised memory"):
            u = u + torch.where(torch.empty_like(u).isnan(), torch.ones_like(u), 0)
        if is_("rounds the state") and x.dtype != torch.float64:
            u = u.half().to(x.dtype)
        if is_("breaks the graph"):
            torch._dynamo.graph_break()
        if is_("chooses by the length") and x.shape[1] > 20:
            u = u * 1.0
        if is_("no more than twenty steps") and x.shape[1] > 20:
            raise ValueError("too long")
        if is_("garbage in gradients"):
            u = zero_where_invalid(u / x.detach(), valid)
        h, final = ops.scan(torch.exp(-step), step * u, before, start=start, valid=valid)
        y = h + u
        y = y + 1 if is_("output where no step counts") else zero_where_invalid(y, valid)
        if is_("keeps the state on the module"):
            self.calls += 1
            y = y + 1e-3 * self.calls
        if is_("weight that is no parameter"):
            y = y * self.hidden.to(y.dtype)
        if is_("constant left uninitialised"):
            y = y * self.constant
        if is_("a state that grows") and x.shape[1]:
            final = h.flatten(1)
        if is_("a state that keeps all states alive") and x.shape[1]:
            final = h[:, -1]
        return y, ToyState(final)


PLAIN: list[tuple[str, Callable[..., None]]] = [
    ("drops the initial state", partial(contract.check_pieces, dtype=torch.float64, kinds="")),
    ("rounds the state", partial(contract.check_precision, dtype=torch.float32, kinds="")),
    ("depends on the length", partial(contract.check_pieces, dtype=torch.float64, kinds="", cuts=contract.STEPS)),
    ("depends on the length", partial(contract.check_pieces, dtype=torch.bfloat16, kinds="")),
    ("depends on the length", partial(contract.check_pieces, dtype=torch.float32, kinds="")),
    ("wrong gradient", partial(contract.check_gradients, kinds="")),
    ("detaches the state", partial(contract.check_chunked_gradients, kinds="")),
    ("drops the initial state", partial(contract.check_chunked_gradients, kinds="")),
    ("looks ahead", contract.check_causality),
    ("leaks across starts", contract.check_packing),
    ("leaks across starts", contract.check_start_at_first_step),
    ("ignores valid", contract.check_start_at_first_step),
    *(
        ("ignores valid", partial(contract.check_padding, where=where, kinds=""))
        for where in ("left", "right", "inside")
    ),
    ("output where no step counts", partial(contract.check_padding, where="inside", kinds="")),
    ("garbage in gradients", partial(contract.check_padding, where="inside", kinds="")),
    ("another step when none is said", contract.check_nominal_steps),
    (
        "ignores elapsed time",
        partial(contract.check_scaled_steps, slow_down=lambda mixer, c: mixer.log_rate.data.add_(c)),
    ),
    ("", contract.check_no_elapsed_time),  # it takes elapsed time, which a mixer that counts steps must not
    ("uninitialised memory", partial(contract.check_backend, name="chunked", kinds="")),
    ("mixes the batch", partial(contract.check_batches_of_states, kinds="")),
    ("keeps the state on the module", partial(contract.check_values, kinds="")),
    ("changes the state in place", partial(contract.check_values, kinds="")),
    ("a state that grows", partial(contract.check_state_size, growth="constant")),
    ("a state that keeps all states alive", partial(contract.check_state_size, growth="constant")),
    ("", partial(contract.check_state_size, growth="grows")),
    ("", contract.check_no_state),  # it has one
    ("", contract.check_both_directions),  # it is causal
    ("initial state of another type", contract.check_initial_state),
    ("drops the initial state", contract.check_empty),
    ("unseeded draws", contract.check_reset),
    ("parameter left uninitialised", contract.check_reset),
    ("parameter left uninitialised", contract.check_meta),
    ("constant left uninitialised", contract.check_meta),
]


def names(case: Any) -> str:
    return case.replace(" ", "_") if isinstance(case, str) else getattr(case, "func", case).__name__


def slow_toy(mixer: Toy, factor: float) -> None:
    """The rate stands for the step, both where the state decays and where the input enters."""
    mixer.log_rate.data.add_(math.log(factor))


@pytest.mark.parametrize(("defect", "check"), PLAIN, ids=names)
def test_a_broken_mixer_is_noticed(defect: str, check: Callable[..., None]) -> None:
    with pytest.raises(AssertionError):
        check(partial(Toy, defect))


@pytest.mark.parametrize("defect", ["weight that is no parameter", "initial state of another type"])
def test_a_broken_file_is_noticed(defect: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        contract.check_saving(partial(Toy, defect), tmp_path)


@pytest.mark.parametrize("kinds", contract.COMBINATIONS)
def test_the_unbroken_mixer_passes(kinds: str, tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        contract.check_pieces(Toy, dtype, kinds)
    contract.check_precision(Toy, torch.float32, kinds)
    contract.check_gradients(Toy, kinds)
    contract.check_chunked_gradients(Toy, kinds)
    contract.check_packing(Toy, kinds.replace("start", "").strip())
    for where in ("left", "right", "inside"):
        contract.check_padding(Toy, where, kinds)
    contract.check_backend(Toy, "chunked", kinds)
    contract.check_batches_of_states(Toy, kinds)
    contract.check_values(Toy, kinds)
    if not kinds:
        for check in (contract.check_causality, contract.check_start_at_first_step, contract.check_nominal_steps):
            check(Toy)
        for check in (contract.check_initial_state, contract.check_empty, contract.check_reset, contract.check_meta):
            check(Toy)
        contract.check_scaled_steps(Toy, slow_toy)
        contract.check_state_size(Toy, "constant")
        contract.check_saving(Toy, tmp_path)


def test_a_mixer_that_drops_its_marks_is_noticed() -> None:
    class Forgetful(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.gain._lr = 1e-3

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            vars(self.gain).clear()
            return self

    with pytest.raises(AssertionError, match="optimiser"):
        contract.check_meta(Forgetful)


def test_a_dead_parameter_is_noticed() -> None:
    class Dead(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(2))

    with pytest.raises(AssertionError, match="without effect"):
        contract.check_chunked_gradients(Dead, "")


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("defect", "check"),
    [
        ("breaks the graph", partial(contract.check_compile, kinds="")),
        ("chooses by the length", partial(contract.check_export, kinds="", with_state=True)),
        ("no more than twenty steps", partial(contract.check_export, kinds="", with_state=True)),
    ],
    ids=names,
)
def test_a_mixer_that_does_not_trace_is_noticed(defect: str, check: Callable[..., None]) -> None:
    with pytest.raises(AssertionError):
        check(partial(Toy, defect))


@pytest.mark.compiled
def test_the_unbroken_mixer_traces() -> None:
    contract.check_compile(Toy, "dt start valid")
    contract.check_export(Toy, "dt start valid", with_state=True)
    contract.check_export(Toy, "", with_state=False)
