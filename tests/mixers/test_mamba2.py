"""Mamba-2's options against a loop over steps, heads and groups; Mamba's against its plain form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu, softplus

from longstate import Mamba, Mamba2

CASES: list[dict[str, Any]] = [
    dict(d_model=6, head_dim=4),
    dict(d_model=6, head_dim=4, d_inner=8, n_groups=2),
    dict(d_model=6, head_dim=4, d_ssm=8, n_groups=2),
    dict(d_model=5, head_dim=3, d_inner=10, d_ssm=3, skip_per_channel=True, bias=True),
    dict(d_model=6, head_dim=3, skip_per_channel=True, norm_before_gate=True, norm_groups=2),
    dict(d_model=6, head_dim=3, gated_norm=False, n_groups=2),
    dict(d_model=6, head_dim=2, d_ssm=6, gated_norm=False, skip_per_channel=True, conv_bias=False),
]


def loop(mixer: Mamba2, x: torch.Tensor) -> torch.Tensor:
    """Compute one sequence ``[t d]`` step by step and head by head."""
    ssm, mlp, n, p = mixer.d_ssm, mixer.d_inner - mixer.d_ssm, mixer.d_state, mixer.head_dim
    shared = mixer.n_groups * n
    z_0, x_0, z, u, delta = mixer.in_proj(x).split([mlp, mlp, ssm, ssm + 2 * shared, mixer.n_heads], -1)
    taps = mixer.conv1d.weight[:, 0]
    padded = torch.cat([u.new_zeros(taps.shape[1] - 1, u.shape[1]), u])
    u = torch.stack([(taps.mT * padded[t : t + taps.shape[1]]).sum(0) for t in range(len(x))])
    u = silu(u if mixer.conv1d.bias is None else u + mixer.conv1d.bias)
    y = torch.zeros(len(x), ssm, dtype=x.dtype)
    for h in range(mixer.n_heads):
        group = h // (mixer.n_heads // mixer.n_groups)
        channels = slice(h * p, (h + 1) * p)
        B = u[:, ssm + group * n : ssm + (group + 1) * n]
        C = u[:, ssm + shared + group * n : ssm + shared + (group + 1) * n]
        skip = mixer.D[channels] if len(mixer.D) == ssm and ssm != mixer.n_heads else mixer.D[h]
        S = torch.zeros(n, p, dtype=x.dtype)
        for t in range(len(x)):
            dt = softplus(delta[t, h] + mixer.dt_bias[h])
            S = torch.exp(-dt * mixer.A_log[h].exp()) * S + torch.outer(B[t], dt * u[t, channels])
            y[t, channels] = C[t] @ S + skip * u[t, channels]
    if mixer.norm is None:
        y = y * silu(z)
    else:
        y = y if mixer.norm.norm_before_gate else y * silu(z)
        groups = y.view(len(x), mixer.norm.groups, -1)
        y = (groups / (groups.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()).flatten(1) * mixer.norm.weight
        y = y * silu(z) if mixer.norm.norm_before_gate else y
    return mixer.out_proj(torch.cat([silu(z_0) * x_0, y], -1))


@pytest.mark.parametrize("options", CASES, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_by_a_loop(options: dict[str, Any]) -> None:
    mixer = Mamba2(d_state=3, **options).double()
    x = torch.randn(2, 11, options["d_model"], dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        wanted = torch.stack([loop(mixer, row) for row in x])
        got, _ = mixer(x)
    assert wanted.std() > 0.05
    assert (got - wanted).abs().max() < 1e-12


def test_parameters_of_a_mixer_with_an_mlp_part() -> None:
    mixer = Mamba2(6, d_state=3, head_dim=2, d_inner=14, d_ssm=4, n_groups=2, skip_per_channel=True)
    shapes = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    assert shapes["in_proj.weight"] == (2 * 14 + 2 * 2 * 3 + 2, 6)
    assert shapes["conv1d.weight"] == (4 + 2 * 2 * 3, 1, 4)
    assert shapes["A_log"] == shapes["dt_bias"] == (2,)
    assert shapes["D"] == shapes["norm.weight"] == (4,)
    assert shapes["out_proj.weight"] == (6, 14)
    assert all(getattr(p, "_no_weight_decay", False) for p in (mixer.D, mixer.A_log, mixer.dt_bias, mixer.norm.weight))
    assert "norm.weight" not in Mamba2(6, head_dim=2, gated_norm=False).state_dict()


def test_parameters_of_inner_norms() -> None:
    plain, weighted = Mamba(6, 3, dt_rank=2, inner_norm="plain"), Mamba(6, 3, dt_rank=2, inner_norm="weighted")
    assert plain.state_dict().keys() == Mamba(6, 3, dt_rank=2).state_dict().keys()
    extra = {name: len(v) for name, v in weighted.state_dict().items() if name not in plain.state_dict()}
    assert extra == {"dt_norm.weight": 2, "B_norm.weight": 3, "C_norm.weight": 3}
    weighted.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 9, 6)
    assert torch.allclose(weighted(x)[0], plain(x)[0])
    bare = Mamba(6, 3, dt_rank=2)
    bare.load_state_dict(plain.state_dict())
    assert (bare(x)[0] - plain(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba(4, inner_norm="weigthed"), "inner_norm='weigthed'.*Did you mean 'weighted'"),
        (lambda: Mamba(4, inner_norm="plain", inner_norm_eps=-1.0), "eps=-1.0"),
        (lambda: Mamba2(4, head_dim=4, d_ssm=12), r"d_ssm=12\): wanted 1 to expand·d_model = 8"),
        (lambda: Mamba2(4, head_dim=4, d_ssm=0), "d_ssm=0"),
        (lambda: Mamba2(4, head_dim=4, d_inner=6, d_ssm=8), "d_inner = 6"),
        (lambda: Mamba2(4, head_dim=4, d_ssm=6), "d_ssm = 6 is not a multiple of head_dim. Try head_dim=2"),
        (lambda: Mamba2(4, head_dim=4, d_inner=6), "d_inner = 6 is not a multiple of head_dim"),
        (lambda: Mamba2(4, head_dim=4, d_inner=0), "d_inner = 0"),
        (lambda: Mamba2(6, head_dim=4, d_inner=12, n_groups=2), r"3 heads \(d_inner / head_dim\)"),
        (lambda: Mamba2(4, head_dim=4, gated_norm=False, norm_before_gate=True), "no norm. Leave one"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
