"""RG-LRU against a loop over steps; where its sequences begin; its gradients where the decay is 1."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from longstate import RGLRU, Attention, ShortConv, Timeline

LENGTH = 17


def loop(mixer: RGLRU, x: torch.Tensor, start: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute one sequence ``[t d]`` step by step and block by block, from the equations of the paper."""
    taps, width = mixer.conv1d.weight[:, 0], mixer.d_inner // mixer.n_heads
    window: list[torch.Tensor] = []
    h, position, outputs = torch.zeros(mixer.d_inner, dtype=x.dtype), 0, []
    for u, begins, counts in zip(x, start.tolist(), valid.tolist(), strict=True):
        if begins:
            window, h, position = [], torch.zeros_like(h), 0
        if not counts:
            outputs.append(torch.zeros_like(u))
            continue
        window = [*window, mixer.linear_x(u)][-taps.shape[1] :]
        z = mixer.conv1d.bias + sum(taps[:, -1 - i] * w for i, w in enumerate(reversed(window)))
        gates = []
        for weight, bias in (
            (mixer.recurrence_gate_weight, mixer.recurrence_gate_bias),
            (mixer.input_gate_weight, mixer.input_gate_bias),
        ):
            blocks = [torch.sigmoid(z[k * width : (k + 1) * width] @ weight[k] + bias[k]) for k in range(mixer.n_heads)]
            gates.append(torch.cat(blocks))
        r, i = gates
        a = torch.sigmoid(-mixer.Lambda) ** (8 * r)  # softplus(Λ) = −log σ(−Λ)
        if position == 0:
            a = torch.zeros_like(a)
        h = a * h + torch.sqrt(1 - a**2) * i * z
        y = mixer.linear_y(u)
        gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        outputs.append(mixer.linear_out(h * gelu))
        position += 1
    return torch.stack(outputs)


def flags(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    start, valid = torch.zeros(3, LENGTH, dtype=torch.bool), torch.ones(3, LENGTH, dtype=torch.bool)
    if case == "padded on the left":
        valid[0, :5] = valid[1, :1] = False
    if case == "starts":
        start[0, [0, 1, 9]] = start[1, 6] = start[2, [3, 4, 16]] = True
    if case == "starts on steps that do not count":
        start[0, 4] = start[1, [2, 3]] = start[2, 16] = True
        valid[0, 4:8] = valid[1, 1:5] = valid[2, 14:] = False
    if case == "both at random":
        start, valid = torch.rand(3, LENGTH) < 0.3, torch.rand(3, LENGTH) < 0.5
    return start, valid


@pytest.mark.parametrize(
    "case", ["plain", "padded on the left", "starts", "starts on steps that do not count", "both at random"]
)
@pytest.mark.parametrize("sizes", [dict(), dict(d_inner=6, n_heads=3, d_conv=2), dict(d_inner=8, n_heads=2)], ids=str)
def test_by_a_loop(sizes: dict, case: str) -> None:
    mixer = RGLRU(4, **sizes).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        x, (start, valid) = torch.randn(3, LENGTH, 4, dtype=torch.float64), flags(case)
        wanted = torch.stack([loop(mixer, *row) for row in zip(x, start, valid, strict=True)])
        when = Timeline(start=start, valid=valid)
        whole, final = mixer(x, None, when)
        assert (whole - wanted).abs().max() < 1e-12
        for cuts in ((0, 5, LENGTH), (0, 1, 2, 3, 16, LENGTH), tuple(range(LENGTH + 1))):
            state, pieces = None, []
            for i, j in itertools.pairwise(cuts):
                y, state = mixer(x[:, i:j], state, when.slice(i, j))
                pieces.append(y)
            assert (torch.cat(pieces, 1) - wanted).abs().max() < 1e-12
            assert torch.equal(state.begun, final.begun)
    assert wanted.abs().max() > 0.1
    if case == "plain":  # the special first step is seen at all
        late = mixer.initial_state(3)._replace(begun=torch.ones(3, dtype=torch.bool))
        assert (mixer(x, late)[0] - wanted).abs().max() > 1e-2


def test_a_sequence_begins_with_the_first_step_that_counts() -> None:
    mixer, nothing = RGLRU(4), torch.zeros(2, 3, dtype=torch.bool)
    state = mixer.initial_state(2)
    assert not state.begun.any()
    _, state = mixer(torch.randn(2, 3, 4), state, Timeline(valid=nothing))
    assert not state.begun.any()
    _, state = mixer(torch.randn(2, 1, 4), state, Timeline(valid=torch.tensor([[True], [False]])))
    assert state.begun.tolist() == [True, False]
    first = torch.tensor([[True, False, False]])
    _, state = mixer(torch.randn(2, 3, 4), state, Timeline(start=first, valid=nothing))
    assert not state.begun.any() and not state.h.any() and not state.conv.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_where_the_decay_is_one(dtype: torch.dtype) -> None:
    """A gate that closes altogether, or a Λ that lets nothing go: a = 1, where the root's derivative is infinite."""
    for name, value in (("recurrence_gate_bias", -200.0), ("recurrence_gate_bias", -40.0), ("Lambda", -800.0)):
        mixer = RGLRU(4, n_heads=2).to(dtype)
        getattr(mixer, name).data.fill_(value)
        x = torch.randn(2, 9, 4, dtype=dtype, requires_grad=True)
        y, state = mixer(x)
        slopes = torch.autograd.grad(y.square().sum() + state.h.sum(), [x, *mixer.parameters()])
        assert all(slope.isfinite().all() for slope in slopes)
        assert slopes[0].abs().max() < 1e3


@pytest.mark.parametrize("bias", [-6.0, -25.0])
def test_slopes_near_a_decay_of_one_are_those_measured(bias: float) -> None:
    """1 − a² here is as small as 1e-10: nothing is clipped that is not infinite."""
    mixer = RGLRU(2).double()
    mixer.recurrence_gate_weight.data.zero_()
    mixer.recurrence_gate_bias.data.fill_(bias)
    x = torch.randn(1, 6, 2, dtype=torch.float64)

    def function(value: torch.Tensor) -> torch.Tensor:
        named = {"recurrence_gate_bias": value}
        return torch.func.functional_call(mixer, named, (x,))[0] * math.exp(-bias / 2)

    value = mixer.recurrence_gate_bias.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (value,), eps=1e-5, atol=1e-4, rtol=1e-4)
    assert torch.autograd.grad(function(value).sum(), value)[0].abs().max() > 1e-3


def test_what_is_drawn() -> None:
    """The decay under an open gate, σ(−Λ)⁸, is uniform in [0.9, 0.999]."""
    mixer = RGLRU(4, d_inner=8000, n_heads=1000)
    decay = torch.sigmoid(-mixer.Lambda.double()) ** 8
    assert 0.899 < decay.min() < 0.901 and 0.998 < decay.max() < 1.0
    assert (decay.mean() - 0.9495).abs() < 0.002 and (decay.std() - 0.099 / 12**0.5).abs() < 0.001
    assert (mixer.input_gate_weight.std() - 8**-0.5).abs() < 0.01
    unmarked = {n for n, p in mixer.named_parameters() if p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)}
    assert unmarked == {f"linear_{n}.weight" for n in ("x", "y", "out")} | {
        "conv1d.weight",
        "input_gate_weight",
        "recurrence_gate_weight",
    }


def test_the_state_stays_wide_under_bfloat16() -> None:
    """A slow decay adds up many small inputs, which bfloat16 would lose beside their sum."""
    mixer = RGLRU(4).bfloat16()
    _, state = mixer(torch.randn(2, 5, 4).bfloat16())
    assert state.h.dtype == mixer.initial_state(2).h.dtype == torch.float32
    assert state.conv.dtype == torch.bfloat16
    exact = RGLRU(4)
    exact.load_state_dict(mixer.float().state_dict())
    mixer.bfloat16()
    x = (1 + 0.1 * torch.randn(1, 600, 4)).bfloat16()
    with torch.no_grad():
        got, wanted = mixer(x)[1].h, exact(x.float())[1].h
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("amp", [torch.bfloat16])
def test_autocast(amp: torch.dtype) -> None:
    for mixer in (RGLRU(8, n_heads=2), ShortConv(8), Attention(8, 2, qk_norm=True, d_conv=3)):
        x = torch.randn(2, 12, 8)
        wanted, _ = mixer(x)
        with torch.autocast("cpu", amp):
            whole, _ = mixer(x)
            first, state = mixer(x[:, :5])
            rest, _ = mixer(x[:, 5:], state)
        assert (whole.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert (torch.cat([first, rest], 1) - whole).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RGLRU(6, n_heads=4), "6 inner channels do not divide into 4 blocks"),
        (lambda: RGLRU(6, d_inner=9, n_heads=2), "9 inner channels"),
        (lambda: RGLRU(6, d_inner=0), "0 inner channels"),
        (lambda: RGLRU(6, n_heads=0), "0 blocks"),
        (lambda: RGLRU(6, d_conv=0), "at least one tap"),
        (lambda: ShortConv(6, d_conv=0), "at least one tap"),
        (lambda: RGLRU(4)(torch.zeros(1, 2, 5)), "RGLRU: input of shape"),
        (lambda: ShortConv(4)(torch.zeros(1, 2, 5)), "ShortConv: input of shape"),
        (lambda: RGLRU(4)(torch.zeros(1, 2, 4), None, Timeline(dt=torch.ones(()))), "RGLRU counts steps"),
        (lambda: ShortConv(4)(torch.zeros(1, 2, 4), None, Timeline(dt=torch.ones(()))), "ShortConv counts steps"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
