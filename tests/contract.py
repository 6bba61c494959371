"""The mixer contract: one row for each configuration, and what every mixer must keep, one function each.

A check takes a factory, builds what it needs and raises ``AssertionError`` where the promise is broken;
``test_contract.py`` runs every check on every row, ``test_contract_controls.py`` shows that each can fail.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import longstate
from longstate import (
    DSS,
    FFM,
    H3,
    LRU,
    LSSL,
    LTC,
    RGLRU,
    S4,
    S4D,
    S5,
    STU,
    TNN,
    Attention,
    HiPPOLegS,
    Hyena,
    LinOSS,
    LiquidS4,
    LongConv,
    Mamba,
    Mamba2,
    Mega,
    Megalodon,
    Mixer,
    SGConv,
    ShortConv,
    SpaceTime,
    Timeline,
    ops,
)
from longstate.ops import _register
from longstate.routes import Bidirectional, HiSS
from poison import poisoned_memory

Factory = Callable[[], Mixer]


class Row(NamedTuple):
    """One configuration of a mixer.

    Attributes:
        name: For reports.
        make: Builds it.
        slow_down: For a mixer with continuous time: makes each nominal step last so many times as long. ``None`` for
            a mixer that counts steps.
        state: Whether the state's size is "constant", "grows" by as much with every step, or there is "none": what
            depends on steps to come, or on all of the past alike, has nothing to go on from.
    """

    name: str
    make: Factory
    slow_down: Callable[[Any, float], None] | None = None
    state: str = "constant"


def _slow_modes(mixer: Any, factor: float) -> None:
    mixer.log_dt.data += math.log(factor)


def _slow_route(route: Bidirectional | HiSS, factor: float) -> None:
    for part in route.children():
        if isinstance(part, Mixer):
            _slow_modes(part, factor)


def _slow_memory(mixer: HiPPOLegS, factor: float) -> None:
    """Where a step is compared with the age of the memory alone, longer steps are a younger memory."""
    mixer.t_0 /= factor


def _slow_ffm(mixer: FFM, factor: float) -> None:
    mixer.alpha.data *= factor
    mixer.omega.data *= factor


def _slow_liquid(mixer: LTC, factor: float) -> None:
    mixer.dt *= factor


def _slow_mamba(mixer: Mamba, factor: float) -> None:
    """Δ meets A and B; what the state should gain, the skip loses and the projection gains."""
    mixer.A_log.data += math.log(factor)
    mixer.D.data /= factor
    mixer.out_proj.weight.data *= factor


def _slow_mamba2(mixer: Mamba2, factor: float) -> None:
    """Δ meets A and x; what the state should gain, the skip and ε lose, as the norm does not see the scale (or, without
    a norm, the projection gains)."""
    mixer.A_log.data += math.log(factor)
    mixer.D.data /= factor
    if mixer.norm is None:
        mixer.out_proj.weight.data[:, -mixer.d_ssm :] *= factor
    else:
        mixer.norm.eps /= factor**2


ROWS = [
    Row("s4d", lambda: S4D(4, d_state=6), _slow_modes),
    Row("s4d lin bilinear", lambda: S4D(4, 6, "lin", "bilinear"), _slow_modes),
    Row("s4d inv", lambda: S4D(3, 4, "inv", output="identity"), _slow_modes),
    Row("s4d quad", lambda: S4D(3, 4, "quad"), _slow_modes),
    Row("s4d dfout", lambda: S4D(4, 6, "dfout"), _slow_modes),
    Row("s4d real", lambda: S4D(4, 5, "real"), _slow_modes),
    Row("s4d real bilinear", lambda: S4D(4, 5, "real", "bilinear"), _slow_modes),
    Row("s5", lambda: S5(4, 6), _slow_modes),
    Row("s5 blocks bilinear", lambda: S5(4, 8, 2, "bilinear"), _slow_modes),
    Row("s4d stable", lambda: S4D(3, 4, "lin", parameterization="stable"), _slow_modes),
    Row("s5 softplus", lambda: S5(3, 4, parameterization="softplus"), _slow_modes),
    Row("lssl", lambda: LSSL(3, 4), _slow_modes),
    Row("lssl own matrices", lambda: LSSL(3, 4, "legt", shared=False, alpha=0.7, output="identity"), _slow_modes),
    Row("dss exp", lambda: DSS(4, 3), _slow_modes),
    Row("dss softmax", lambda: DSS(4, 3, "softmax", 100)),
    Row("s4", lambda: S4(3, 4), _slow_modes),
    Row("s4 legt untied", lambda: S4(3, 4, "legt", tied=False, output="identity"), _slow_modes),
    Row("hippo_legs", lambda: HiPPOLegS(4, 3), _slow_memory),
    Row("lru", lambda: LRU(4, 5)),
    Row("lru identity", lambda: LRU(3, 4, 0.0, 0.9, max_phase=0.5, output="identity")),
    Row("linoss im", lambda: LinOSS(4, 3), _slow_modes),
    Row("linoss imex", lambda: LinOSS(3, 4, "imex", "exp", dt_max=0.3), _slow_modes),
    Row("ffm", lambda: FFM(4, 3, 2), _slow_ffm),
    Row("ltc", lambda: LTC(4, 3, steps=2), _slow_liquid),
    Row("mamba", lambda: Mamba(4, d_state=3), _slow_mamba),
    Row(
        "mamba other sizes", lambda: Mamba(6, 2, d_conv=2, expand=1, dt_rank=3, bias=True, conv_bias=False), _slow_mamba
    ),
    Row("mamba plain inner norms", lambda: Mamba(4, 3, dt_rank=3, inner_norm="plain"), _slow_mamba),
    Row("mamba weighted inner norms", lambda: Mamba(4, 3, dt_rank=3, inner_norm="weighted"), _slow_mamba),
    Row("mamba2", lambda: Mamba2(6, d_state=3, head_dim=3), _slow_mamba2),
    Row("mamba2 groups", lambda: Mamba2(8, 3, head_dim=4, n_groups=2, bias=True), _slow_mamba2),
    Row(
        "mamba2 dt_limit",
        lambda: Mamba2(6, 3, d_conv=1, head_dim=4, norm_groups=3, dt_limit=(0.01, 0.03)),
        _slow_mamba2,
    ),
    Row("mamba2 part mlp", lambda: Mamba2(6, 3, head_dim=4, d_ssm=8, n_groups=2), _slow_mamba2),
    Row(
        "mamba2 no norm",
        lambda: Mamba2(6, 3, head_dim=3, d_ssm=9, gated_norm=False, skip_per_channel=True),
        _slow_mamba2,
    ),
    Row(
        "mamba2 norm before gate",
        lambda: Mamba2(6, 3, head_dim=5, d_inner=10, norm_before_gate=True, skip_per_channel=True),
        _slow_mamba2,
    ),
    Row("rglru", lambda: RGLRU(4)),
    Row("rglru blocks", lambda: RGLRU(4, d_inner=6, n_heads=2, d_conv=2)),
    Row("short_conv", lambda: ShortConv(4)),
    Row("short_conv bias", lambda: ShortConv(3, d_conv=4, bias=True)),
    Row("attention", lambda: Attention(6, 3), state="grows"),
    Row("attention window", lambda: Attention(6, 3, window=5)),
    Row("attention grouped", lambda: Attention(8, 4, 2, window=16, bias=True)),
    Row("attention partial rotary", lambda: Attention(8, 2, 1, head_dim=6, rotary_dim=2), state="grows"),
    Row(
        "attention norms",
        lambda: Attention(6, 2, 1, head_dim=4, scale=0.3, out_bias=True, qk_norm=True, norm_eps=1e-2),
        state="grows",
    ),
    Row("attention convolution", lambda: Attention(6, 3, d_conv=4), state="grows"),
    Row(
        "attention window convolution",
        lambda: Attention(8, 2, 1, window=5, qk_norm=True, d_conv=3, conv_bias=False),
    ),
    Row("mega", lambda: Mega(4, 3, d_key=4, d_value=6), state="grows"),
    Row("mega chunk", lambda: Mega(4, 2, d_key=6, chunk=8)),
    Row("megalodon", lambda: Megalodon(6, 3, d_key=8, n_heads=2, norm_groups=2), state="grows"),
    Row("megalodon chunk", lambda: Megalodon(4, 4, d_key=6, d_value=5, chunk=9)),
    Row("h3", lambda: H3(4, 4, 2, d_conv=3)),
    Row("h3 single channels", lambda: H3(3, 6, d_conv=5)),
    Row("bidirectional", lambda: Bidirectional(S4D(4, 6), S5(4, 4)), _slow_route, "none"),
    Row("bidirectional shared", lambda: Bidirectional(S4D(4, 4, "inv", output="identity")), _slow_route, "none"),
    Row("hiss", lambda: HiSS(S4D(4, 4), S5(4, 4), 3), _slow_route),
    Row("long_conv", lambda: LongConv(4, 20, squash=0.05, kernel_dropout=0.0)),
    Row("long_conv taps", lambda: LongConv(3, 80, kernel_dropout=0.0, output="identity")),
    Row("sg_conv", lambda: SGConv(4, 3, 4)),
    Row("hyena", lambda: Hyena(3, 40, d_hidden=5, bands=2), state="none"),
    Row("liquid_s4", lambda: LiquidS4(3, 4, 3, dt_min=0.1, dt_max=0.5)),
    Row("spacetime", lambda: SpaceTime(5, 4, differences=(0, 1, 2), averages=(3,))),
    Row("stu", lambda: STU(3, 12, 2, alpha=0.3)),
    Row("tnn", lambda: TNN(4, 3, d_hidden=6), state="none"),
    Row("tnn state", lambda: TNN(3, d_hidden=4, n_layers=1, decay=0.9, state_for=9)),
]

BATCH = 3
LENGTH = 70  # more than a chunk of any op, and enough for S4D to convolve
COMBINATIONS = ["", "dt", "start", "valid", "dt start", "dt valid", "start valid", "dt start valid"]
WHOLE, STEPS = (0, LENGTH), tuple(range(LENGTH + 1))
CUTS = (0, 1, 1, 34, 35, LENGTH)  # one of the pieces is empty

# How far two faces may be apart, relative to the largest entry of a tensor.
#
# bfloat16 has 8 significant bits, so a rounding errs by at most u = 2⁻⁸ of the number. States and decays are kept in
# float32; between input and output, activations are rounded to bfloat16 at most 8 times one after the other (Mamba:
# in_proj, convolution, x_proj, dt_proj, scan, SiLU(z), their product, out_proj; attention: projection, two products and
# a sum of the rotation, scores, weights, values, o_proj; the others less). To first order each face is within 8u of the
# exact result, where no stage enlarges the error against its largest entry; so two faces are within 16u of each other.
# Inner norms, and a convolution before attention, add up to three more; roundings seldom all point one way, and these
# rows keep to the same bound.
ROUNDINGS = 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2 * ROUNDINGS * 2.0**-8}


# ------------------------------------------------------------------------------------------------------------- material


def build(make: Factory, dtype: torch.dtype = torch.float64) -> Mixer:
    """Return a mixer with every parameter moved off its initial value, so that ones and zeros hide nothing."""
    mixer = make()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.to(dtype)


def inputs(mixer: Mixer, length: int = LENGTH, batch: int = BATCH) -> Tensor:
    parameter = next(mixer.parameters())
    return torch.randn(batch, length, mixer.d_model, dtype=parameter.dtype)


def timeline(kinds: str, length: int = LENGTH, batch: int = BATCH) -> Timeline | None:
    """Return a random timeline with the entries named, or none at all."""
    if not kinds:
        return None
    return Timeline(
        dt=0.2 + 2 * torch.rand(batch, length, dtype=torch.float64) if "dt" in kinds else None,
        start=torch.rand(batch, length) < 0.1 if "start" in kinds else None,
        valid=torch.rand(batch, length) < 0.8 if "valid" in kinds else None,
    )


def warm_state(mixer: Mixer, batch: int = BATCH) -> Any:
    """Return a state some steps into sequences of different lengths."""
    ragged = torch.arange(9) < torch.tensor([9, 4, 7, 2, 8])[:batch, None]
    with torch.no_grad():
        return mixer(inputs(mixer, 9, batch), None, Timeline(valid=ragged))[1]


def run(mixer: Mixer, x: Tensor, state: Any, when: Timeline | None, cuts: Sequence[int]) -> tuple[Tensor, Any]:
    """Run a sequence piece by piece, the state handed on."""
    outputs = []
    for begin, end in itertools.pairwise(cuts):
        y, state = mixer(x[:, begin:end], state, None if when is None else when.slice(begin, end))
        outputs.append(y)
    return torch.cat(outputs, 1), state


def distance(got: Any, wanted: Any) -> float:
    """Return the largest difference between nested tensors, relative to the largest entry of each.

    Not a number counts as infinite, and so does another shape, type or structure. Whole numbers are equal or
    infinitely apart.
    """
    (a, a_shape), (b, b_shape) = tree_flatten(got), tree_flatten(wanted)
    if a_shape != b_shape:
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x is None and y is None:
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return math.inf
        if not x.dtype.is_floating_point and not x.dtype.is_complex:
            worst = max(worst, 0.0 if torch.equal(x, y) else math.inf)
        elif x.numel():
            wide = torch.complex128 if x.dtype.is_complex else torch.float64
            error = ((x.to(wide) - y.to(wide)).abs().max() / y.to(wide).abs().max().clamp(min=1e-3)).item()
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def differentiable(tree: Any) -> Any:
    """Return copies of floating-point and complex tensors that ask for their gradients."""
    return tree_map(lambda x: x.detach().clone().requires_grad_(_flows(x)) if isinstance(x, Tensor) else x, tree)


def _flows(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def gradients(results: Any, sources: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a fixed random function of outputs and final states."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for x in tree_leaves(results):
        if _flows(x) and x.requires_grad:
            x = torch.view_as_real(x) if x.is_complex() else x
            total = total + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    return list(torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True))


def sources(mixer: Mixer, x: Tensor, state: Any) -> list[Tensor]:
    return [x, *mixer.parameters(), *(leaf for leaf in tree_leaves(state) if _flows(leaf))]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Prefer a backend in every op that has it."""
    before = dict(_register._BACKENDS)
    try:
        for op, names in before.items():
            if name == "reference" or name in names:
                _register._BACKENDS[op] = (name, *(other for other in names if other != name))
        yield
    finally:
        _register._BACKENDS.update(before)


def other_backends() -> list[str]:
    """Return the backends beside the reference that this machine can run."""
    known = {
        name for op in ops.backends().values() for name, what in op.items() if not what.startswith("not available")
    }
    return sorted(known - {"reference"})


# --------------------------------------------------------------------------------------------------------------- checks


def check_pieces(make: Factory, dtype: torch.dtype, kinds: str, cuts: Sequence[int] = CUTS) -> None:
    """Whole = pieces, outputs and final state, from the initial state and from any other."""
    mixer = build(make, dtype)
    x, when = inputs(mixer), timeline(kinds)
    with torch.no_grad():
        for state in (None, warm_state(mixer)):
            assert distance(run(mixer, x, state, when, cuts), mixer(x, state, when)) <= TOLERANCE[dtype]


def check_precision(make: Factory, dtype: torch.dtype, kinds: str) -> None:
    """Narrow types come as near to float64 as their roundings allow: in bfloat16 half of what two faces may differ by.

    float32's bound is wider than that between faces: Δ and A lie in exponents, and their roundings add up over the
    sequence.
    """
    bound = {torch.float32: 1e-4, torch.bfloat16: TOLERANCE[torch.bfloat16] / 2}[dtype]
    mixer = build(make, dtype)
    x, when = inputs(mixer), timeline(kinds)
    with torch.no_grad():
        y, _ = mixer(x, None, when)
        exact, _ = copy.deepcopy(mixer).double()(x.double(), None, when)
        assert y.dtype == dtype
        assert distance(y.double(), exact) <= bound


def check_gradients(make: Factory, kinds: str) -> None:
    """Gradients of outputs and final state by inputs, parameters, initial state and elapsed time are those measured."""
    mixer = build(make)
    x = inputs(mixer, 5, 2)
    when = timeline(kinds, 5, 2)
    leaves, structure = tree_flatten((differentiable(x), differentiable(warm_state(mixer, 2)), differentiable(when)))
    names = [name for name, _ in mixer.named_parameters()]
    flowing = [i for i, leaf in enumerate(leaves) if _flows(leaf)]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, value in zip(flowing, values, strict=False):
            filled[i] = value
        parameters = dict(zip(names, values[len(flowing) :], strict=True))
        result = torch.func.functional_call(mixer, parameters, tree_unflatten(filled, structure))
        return tuple(leaf for leaf in tree_leaves(result) if _flows(leaf) and leaf.numel())

    values = [*(leaves[i] for i in flowing), *(p.detach().clone().requires_grad_() for p in mixer.parameters())]
    try:
        assert torch.autograd.gradcheck(function, values, fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(str(error)) from error


def check_chunked_gradients(make: Factory, kinds: str, cuts: Sequence[int] = CUTS) -> None:
    """Gradients that flow through handed-on states are those of the whole, and reach every parameter."""
    mixer = build(make)
    x, state, when = differentiable(inputs(mixer)), differentiable(warm_state(mixer)), timeline(kinds)
    wanted = gradients(mixer(x, state, when), sources(mixer, x, state))
    got = gradients(run(mixer, x, state, when, cuts), sources(mixer, x, state))
    assert distance(got, wanted) <= 1e-10
    assert all(g.abs().max() > 0 for g in wanted[: 1 + len(list(mixer.parameters()))] if g.numel()), (
        "a parameter without effect"
    )


def check_causality(make: Factory, kinds: str = "") -> None:
    """Outputs depend on the present and the past only, and on both."""
    mixer = build(make)
    x, state, when = inputs(mixer), warm_state(mixer), timeline(kinds)
    with torch.no_grad():
        before, _ = mixer(x, state, when)
        for t in (0, 1, 40, LENGTH - 1):
            changed = x.clone()
            changed[:, t:] += torch.randn_like(changed[:, t:])
            after, _ = mixer(changed, state, when)
            assert distance(after[:, :t], before[:, :t]) <= 1e-12
            assert (after[:, t] - before[:, t]).abs().amax(-1).min() > 1e-6, "the present has no effect"
        nudged = x.clone()
        nudged[:, 40] += 1
        after, _ = mixer(nudged, state, when)
        assert (after[:, 41] - before[:, 41]).abs().amax(-1).min() > 1e-9, "the past has no effect"


def check_packing(make: Factory, kinds: str = "") -> None:
    """Sequences packed into a row = each by itself; the row's final state is that of the last one."""
    mixer = build(make)
    lengths = (3, 1, 40, 24, 2)
    x, when = inputs(mixer), timeline(kinds) or Timeline()
    first = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    first[:, [sum(lengths[:i]) for i in range(1, len(lengths))]] = True
    state = warm_state(mixer)
    with torch.no_grad():
        packed, final = mixer(x, state, when._replace(start=first))
        begin, outputs, alone = 0, [], state
        for i, length in enumerate(lengths):
            piece = when.slice(begin, begin + length)
            y, alone = mixer(x[:, begin : begin + length], None if i else state, piece)
            outputs.append(y)
            begin += length
        assert distance(packed, torch.cat(outputs, 1)) <= 1e-10
        # Full attention keeps room for every step of the row; what is in use is compared by going on from there.
        more = inputs(mixer, 6)
        assert distance(mixer(more, final)[0], mixer(more, alone)[0]) <= 1e-10


def check_start_at_first_step(make: Factory) -> None:
    """A start at the first step, valid or not, forgets the state given."""
    mixer = build(make)
    x, state = inputs(mixer, 6), warm_state(mixer)
    start = torch.arange(6).expand(BATCH, 6) == 0
    with torch.no_grad():
        assert distance(mixer(x, state, Timeline(start=start))[0], mixer(x)[0]) <= 1e-10
        nothing = torch.zeros(BATCH, 6, dtype=torch.bool)
        _, cleared = mixer(x, state, Timeline(start=start, valid=nothing))
        assert distance(mixer(x, cleared)[0], mixer(x)[0]) <= 1e-10
        _, kept = mixer(x, state, Timeline(valid=nothing))
        assert distance(mixer(x, kept)[0], mixer(x, state)[0]) <= 1e-10


def check_padding(make: Factory, where: str, kinds: str) -> None:
    """Padded anywhere = unpadded, in outputs, final state and gradients, whatever stands in the padding."""
    mixer = build(make)
    x, state, when = inputs(mixer), differentiable(warm_state(mixer)), timeline(kinds) or Timeline()
    gaps = 17
    if where == "inside":
        kept = torch.randperm(LENGTH + gaps)[:LENGTH].sort().values
    else:
        kept = torch.arange(LENGTH) + (gaps if where == "left" else 0)

    def spread(value: Tensor | None, fill: float) -> Tensor | None:
        if value is None:
            return None
        wide = value.new_full((BATCH, LENGTH + gaps, *value.shape[2:]), fill)
        wide[:, kept] = value
        return wide

    valid = torch.zeros(BATCH, LENGTH + gaps, dtype=torch.bool)
    valid[:, kept] = True if when.valid is None else when.valid
    short, wide, more = differentiable(x), differentiable(spread(x, math.nan)), inputs(mixer, 3)
    dt = None if when.dt is None else differentiable(when.dt)
    wide_dt = None if dt is None else differentiable(spread(when.dt, math.nan))
    padded = Timeline(wide_dt, spread(when.start, False), valid)

    y, final = mixer(short, state, when._replace(dt=dt))
    y_wide, final_wide = mixer(wide, state, padded)
    assert (y_wide[~valid] == 0).all(), "an output where no step counts"
    # Full attention keeps room for every step of the row: final states are compared by going on from them.
    wanted, got = (y, mixer(more, final)[0]), (y_wide[:, kept], mixer(more, final_wide)[0])
    assert distance(got, wanted) <= 1e-10
    slopes = gradients(got, [*sources(mixer, wide, state), *([] if dt is None else [wide_dt])])
    wanted_slopes = gradients(wanted, [*sources(mixer, short, state), *([] if dt is None else [dt])])
    assert all(slope.isfinite().all() for slope in slopes), "garbage reached a gradient"
    for i in (0, *([-1] if dt is not None else [])):
        assert (slopes[i][~valid] == 0).all(), "a gradient where no step counts"
        slopes[i] = slopes[i][:, kept]
    assert distance(slopes, wanted_slopes) <= 1e-10


def check_nominal_steps(make: Factory, kinds: str = "") -> None:
    """Steps of one nominal step each are what is meant when nothing is said."""
    mixer = build(make)
    x, state, when = inputs(mixer), warm_state(mixer), timeline(kinds) or Timeline()
    with torch.no_grad():
        wanted = mixer(x, state, when)
        for shape in ((), (1,), (1, 1), (1, LENGTH), (BATCH, 1), (BATCH, LENGTH)):
            assert distance(mixer(x, state, when._replace(dt=torch.ones(shape, dtype=x.dtype))), wanted) <= 1e-10


def check_scaled_steps(make: Factory, slow_down: Callable[[Any, float], None]) -> None:
    """Steps that last longer throughout = a mixer whose Δ is so much larger, and two zero-length steps = none."""
    mixer = build(make)
    slow = copy.deepcopy(mixer)
    slow_down(slow, 2.5)
    x = inputs(mixer)
    with torch.no_grad():
        wanted, _ = slow(x)
        assert distance(mixer(x)[0], wanted) > 1e-4, "elapsed time has no effect"
        for dt in (torch.tensor(2.5, dtype=x.dtype), torch.full((BATCH, LENGTH), 2.5, dtype=x.dtype)):
            assert distance(mixer(x, None, Timeline(dt))[0], wanted) <= 1e-10


def check_no_elapsed_time(make: Factory) -> None:
    """A mixer that counts steps says so when it is told of elapsed time."""
    mixer = build(make)
    x = inputs(mixer)
    message = ""
    try:
        mixer(x, None, Timeline(dt=torch.ones(BATCH, LENGTH)))
    except ValueError as error:
        message = str(error)
    assert type(mixer).__name__ in message, "elapsed time was taken without a word"


def check_backend(make: Factory, name: str, kinds: str, length: int = LENGTH) -> None:
    """A backend = the reference, forward and backward, with whatever stood in the memory it was given."""
    mixer = build(make)
    x, state, when = differentiable(inputs(mixer, length)), differentiable(warm_state(mixer)), timeline(kinds, length)
    with backend("reference"):
        wanted = mixer(x, state, when)
        wanted_gradients = gradients(wanted, sources(mixer, x, state))
    with backend(name), poisoned_memory():
        got = mixer(x, state, when)
        got_gradients = gradients(got, sources(mixer, x, state))
    assert distance(got, wanted) <= 1e-10
    assert distance(got_gradients, wanted_gradients) <= 1e-10


def check_batches_of_states(make: Factory, kinds: str) -> None:
    """States are chosen, reordered and joined as their sequences are."""
    mixer = build(make)
    x, state, when = inputs(mixer), warm_state(mixer), timeline(kinds) or Timeline()
    with torch.no_grad():
        y, final = mixer(x, state, when)
        for index in ([2, 0], [1, 1, 2, 0], torch.tensor([True, False, True]), slice(1, 3), 1):
            rows = [index] if isinstance(index, int) else index
            part = mixer(
                x[rows], longstate.state.select(state, index), Timeline(*(e if e is None else e[rows] for e in when))
            )
            assert distance(part, (y[rows], longstate.state.select(final, index))) <= 1e-10
        # States of different ages together: the first two sequences go on, the third begins.
        joined = longstate.state.concatenate([longstate.state.select(state, slice(0, 2)), mixer.initial_state(1)])
        got, _ = mixer(x, joined, when)
        assert distance(got[:2], y[:2]) <= 1e-10
        alone, _ = mixer(x[2:], None, Timeline(*(e if e is None else e[2:] for e in when)))
        assert distance(got[2:], alone) <= 1e-10


def check_values(make: Factory, kinds: str) -> None:
    """Nothing given is changed, nothing is kept on the module, and the same call gives the same result."""
    mixer = build(make)
    x, state, when = differentiable(inputs(mixer)), differentiable(warm_state(mixer)), timeline(kinds)
    given = tree_leaves((x, state, when))
    copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in given]
    contents = _contents(mixer)
    results = [mixer(x, state, when)]
    gradients(results[0], sources(mixer, x, state))
    results.append(mixer(x, state, when))
    assert distance(results[1], results[0]) == 0
    for leaf, copied in zip(given, copies, strict=True):
        assert not isinstance(leaf, Tensor) or torch.equal(leaf, copied), "an argument was changed"
    assert _contents(mixer) == contents, "something was kept on the module"
    # A change of the result's memory must not reach what was given.
    for leaf in tree_leaves(results[0][1]):
        if _flows(leaf):
            leaf.detach().fill_(7)
    for leaf, copied in zip(given, copies, strict=True):
        assert not isinstance(leaf, Tensor) or torch.equal(leaf, copied), (
            "the new state shares memory with what was given"
        )


def _contents(mixer: Mixer) -> dict[str, Any]:
    """Return what hangs on a module: names, and for tensors their place and count of changes."""
    return {
        f"{path}.{name}": (value.data_ptr(), value._version) if isinstance(value, Tensor) else repr(value)
        for path, module in mixer.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if not name.startswith("_")
    }


def check_state_size(make: Factory, growth: str) -> None:
    """The state has the initial one's size after any number of steps (or grows alike with each), and holds no more."""
    mixer = build(make)
    sizes = []
    with torch.no_grad():
        for length in (1, 10, 150, 300):
            state = mixer(inputs(mixer, length))[1]
            sizes.append(longstate.state.nbytes(state))
            held = sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(state))
            assert held == sizes[-1], "the state keeps more memory than it needs"
    initial = longstate.state.nbytes(mixer.initial_state(BATCH))
    if growth == "constant":
        assert sizes == [initial] * 4
    else:
        assert sizes[2] - sizes[1] == 140 * (sizes[1] - sizes[0]) / 9 > 0
        assert sizes[3] - sizes[2] == 150 * (sizes[1] - sizes[0]) / 9


def check_no_state(make: Factory) -> None:
    """There is no state: none is returned, and one that is given is refused with a word on what to do."""
    mixer = build(make)
    x = inputs(mixer, 6)
    assert mixer.initial_state(BATCH) is None and mixer(x)[1] is None
    message = ""
    try:
        mixer(x, (x[:, 0],))
    except ValueError as error:
        message = str(error)
    assert type(mixer).__name__ in message and "state" in message, "a state was taken without a word"


def check_both_directions(make: Factory) -> None:
    """Outputs depend on the past, the present and the future."""
    mixer = build(make)
    x = inputs(mixer)
    with torch.no_grad():
        before, _ = mixer(x)
        nudged = x.clone()
        nudged[:, 40] += 1
        change = (mixer(nudged)[0] - before).abs().amax(-1)
        assert change[:, 39:42].min() > 1e-9


def check_initial_state(make: Factory, dtype: torch.dtype = torch.float64) -> None:
    """No state = the initial state, which has one entry for each sequence and the types of those that come back."""
    mixer = build(make, dtype)
    x = inputs(mixer, 9)
    with torch.no_grad():
        state = mixer.initial_state(BATCH)
        wanted = mixer(x)
        assert distance(mixer(x, state), wanted) <= TOLERANCE[dtype]
        assert [leaf.dtype for leaf in tree_leaves(state)] == [leaf.dtype for leaf in tree_leaves(wanted[1])]
        assert all(leaf.shape[0] == BATCH for leaf in tree_leaves(state))
        assert type(state) is type(wanted[1]) and hasattr(state, "_fields")
        assert all(
            leaf.dtype not in (torch.bfloat16, torch.float16)
            for name, leaf in state._asdict().items()
            if name in ("ssm", "h")
        )


def check_empty(make: Factory) -> None:
    """No steps give no outputs and the state as it was; no sequences give none."""
    mixer = build(make)
    state = warm_state(mixer)
    with torch.no_grad():
        y, after = mixer(inputs(mixer, 0), state)
        assert y.shape == (BATCH, 0, mixer.d_model)
        assert distance(after, state) == 0
        assert mixer(inputs(mixer, 5, 0))[0].shape == (0, 5, mixer.d_model)


def check_saving(make: Factory, folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """A state and the parameters come back from files as they were."""
    mixer = build(make, dtype)
    x, state = inputs(mixer, 6), warm_state(mixer)
    loaded = None
    if state is not None:
        path = folder / "state.safetensors"
        longstate.state.save(state, path, {"note": "ä"})
        assert longstate.state.load_metadata(path)["note"] == "ä"
        loaded = longstate.state.load(path, mixer.initial_state(1))
        assert distance(loaded, state) == 0
    save_file({name: value.contiguous() for name, value in mixer.state_dict().items()}, folder / "weights.safetensors")
    other = make().to(dtype)
    assert distance(other(x)[0], mixer(x)[0]) > 0
    other.load_state_dict(load_file(folder / "weights.safetensors"))
    assert distance(other(x, loaded), mixer(x, state)) == 0


def check_reset(make: Factory) -> None:
    """reset_parameters draws what construction draws, from the same seed the same, and everything is finite."""
    drawn, reset = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        drawn.append({name: p.detach().clone() for name, p in make().named_parameters()})
        mixer = make()
        copies = []
        for _ in range(2):
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.fill_(math.nan)
            torch.manual_seed(1000 + seed)
            mixer.reset_parameters()
            copies.append({name: p.detach().clone() for name, p in mixer.named_parameters()})
        assert distance(copies[0], copies[1]) == 0
        reset.append(copies[0])
    for name in drawn[0]:
        _assert_alike(torch.stack([d[name] for d in drawn]), torch.stack([r[name] for r in reset]), name)


def _assert_alike(a: Tensor, b: Tensor, name: str) -> None:
    """Assert that two sets of draws come from one distribution, by mean and spread, to five of their errors."""
    assert a.isfinite().all() and b.isfinite().all(), name
    if (a == a[:1]).all():
        assert torch.equal(a, b), name
        return
    a, b = a.double(), b.double()
    for x, y in ((a, b), (a.square(), b.square())):
        error = ((x.var() + y.var()) / x.numel()).sqrt()
        assert (x.mean() - y.mean()).abs() < 5 * error, name


def check_meta(make: Factory) -> None:
    """Built without memory and then given some, a mixer has the values, types and marks of one built at once."""
    with torch.device("meta"):
        mixer = make()
    tensors = [*mixer.parameters(), *mixer.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    with poisoned_memory():
        mixer.to_empty(device="cpu")
        torch.manual_seed(5)
        mixer.reset_parameters()
    other = make()
    torch.manual_seed(5)
    other.reset_parameters()
    assert distance(dict(mixer.state_dict()), dict(other.state_dict())) == 0
    assert all(p.isfinite().all() for p in mixer.parameters())
    x = inputs(mixer)
    assert distance(mixer(x), other(x)) == 0
    marks = [{name: vars(p) for name, p in m.named_parameters()} for m in (mixer, other)]
    assert marks[0] == marks[1], "an optimiser would treat the parameters otherwise"


def check_compile(make: Factory, kinds: str, compiler: str = "aot_eager", lengths: Sequence[int] = (LENGTH,)) -> None:
    """One graph, at any length (a change of length makes a new one), forward and backward."""
    mixer = build(make)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=compiler)
    state = differentiable(warm_state(mixer))
    for length in lengths:
        x, when = differentiable(inputs(mixer, length)), timeline(kinds, length)
        wanted = mixer(x, state, when)
        wanted_gradients = gradients(wanted, sources(mixer, x, state))
        try:
            got = compiled(x, state, when)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(str(error)) from error
        assert distance(got, wanted) <= 1e-10
        assert distance(gradients(got, sources(mixer, x, state)), wanted_gradients) <= 1e-10


def check_export(make: Factory, kinds: str, with_state: bool) -> None:
    """One graph for any batch and length."""
    mixer = build(make)
    torch._dynamo.reset()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")

    def example(batch: int, length: int) -> tuple[Tensor, Any, Any]:
        state = warm_state(mixer, batch) if with_state else None
        return inputs(mixer, length, batch), state, timeline(kinds, length, batch)

    x, state, when = example(2, 11)
    room = torch.export.Dim("room")
    small = mixer.initial_state(2)
    shapes = (
        {0: batch, 1: length},
        None if state is None else tree_map(lambda s, i: _axes(s, i, batch, room), state, small),
        None if when is None else Timeline(*(None if entry is None else {0: batch, 1: length} for entry in when)),
    )
    try:
        program = torch.export.export(mixer, (x, state, when), dynamic_shapes=shapes).module()
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise AssertionError(str(error)) from error
    with torch.no_grad():
        for b, t in ((2, 11), (3, LENGTH), (1, 1), (5, 2), (2, 300)):
            arguments = example(b, t)
            assert distance(program(*arguments), mixer(*arguments)) <= 1e-10


def _axes(tensor: Tensor, initial: Tensor, batch: Any, room: Any) -> dict[int, Any]:
    """Return the axes that vary: the batch, and the steps of a state that grows."""
    return {0: batch} | ({1: room} if tensor.ndim > 1 and tensor.shape[1] != initial.shape[1] else {})
