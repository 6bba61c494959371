"""What mixers are made of, against formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from longstate.mixers._parts import RMSNorm, ShortConvolution
from longstate.timeline import Timeline


@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("options", [{}, dict(groups=2), dict(offset=1.0), dict(offset=-0.5, groups=3)], ids=str)
@pytest.mark.parametrize("scale", [True, False], ids=["weight", "no weight"])
def test_norm_by_its_formula(options: dict, gated: bool, before: bool, scale: bool) -> None:
    if not scale and "offset" in options:
        options = {name: value for name, value in options.items() if name != "offset"}
    norm = RMSNorm(6, 0.3, scale=scale, norm_before_gate=before, **options).double()
    x, gate = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    weight = torch.ones(6, dtype=torch.float64)
    if scale:
        torch.nn.init.normal_(norm.weight)
        weight = options.get("offset", 0.0) + norm.weight.detach()
    wanted = x * silu(gate) if gated and not before else x
    groups = wanted.view(2, 3, 5, options.get("groups", 1), -1)
    wanted = (groups / (groups.square().mean(-1, keepdim=True) + 0.3).sqrt()).flatten(-2) * weight
    wanted = wanted * silu(gate) if gated and before else wanted
    got = norm(x, gate) if gated else norm(x)
    assert (got - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("offset", [0.0, 1.0, 0.25])
def test_norm_starts_as_a_norm_alone(offset: float) -> None:
    norm, x = RMSNorm(8, offset=offset), torch.randn(4, 8)
    assert torch.equal(norm.weight, torch.full((8,), 1 - offset))
    assert (norm(x) - RMSNorm(8, scale=False)(x)).abs().max() < 1e-6
    assert norm.weight._no_weight_decay


def test_norm_without_weight_has_no_parameters_and_the_type_of_its_input() -> None:
    norm = RMSNorm(4, scale=False)
    assert norm.state_dict() == {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert norm(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert RMSNorm(4).bfloat16()(torch.randn(2, 4)).dtype == torch.bfloat16


def test_a_small_weight_beside_its_offset_is_not_rounded_away() -> None:
    """In bfloat16, 1 + 0.001 is 1: the result is rounded, and nothing before it."""
    norm = RMSNorm(4096, offset=1.0).bfloat16()
    norm.weight.data.normal_(std=0.01)
    x = torch.randn(1, 4096).bfloat16()
    wide = RMSNorm(4096, offset=1.0).double()
    wide.weight.data.copy_(norm.weight.data)
    exact = wide(x.double())
    assert ((norm(x).double() - exact) / exact).abs().max() <= 1.001 * 2.0**-8


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_short_convolution_by_torch(activation: str | None, bias: bool) -> None:
    ours = ShortConvolution(5, 3, bias, activation)
    theirs = torch.nn.Conv1d(5, 5, 3, groups=5, padding=2, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, 7, 5)
    wanted = theirs(u.mT)[..., :7].mT
    got, window = ours(u, None, Timeline())
    assert (got - (wanted if activation is None else silu(wanted))).abs().max() < 1e-6
    assert torch.equal(window, u[:, -2:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMSNorm(6, groups=4), "not a multiple"),
        (lambda: RMSNorm(6, groups=0), "not a multiple"),
        (lambda: RMSNorm(6, eps=0.0), "eps=0.0.*1e-5"),
        (lambda: RMSNorm(6, offset=1.0, scale=False), "offset=1.0.*Leave one out"),
        (lambda: ShortConvolution(4, 0, True), "at least one tap"),
        (lambda: ShortConvolution(4, 2, True, "relu"), "no such activation.*silu"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
