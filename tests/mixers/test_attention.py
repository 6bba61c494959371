"""Attention against torch's, given explicit masks and a rotation written out by hand."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from longstate import Attention, Timeline

CASES = [
    dict(n_heads=4),
    dict(n_heads=4, n_kv_heads=2),
    dict(n_heads=3, n_kv_heads=1, head_dim=6, rotary_dim=4, rotary_base=100.0),
    dict(n_heads=2, rotary_dim=0, bias=True),
    dict(n_heads=4, window=5),
    dict(n_heads=4, n_kv_heads=2, window=1),
    dict(n_heads=2, window=100),
    dict(n_heads=4, scale=0.7, out_bias=True),
    dict(n_heads=2, n_kv_heads=1, bias=True, out_bias=False, qk_norm=True, norm_eps=0.1),
    dict(n_heads=2, n_kv_heads=1, d_conv=3),
    dict(n_heads=4, n_kv_heads=2, window=5, d_conv=4, conv_bias=False, qk_norm=True, scale=2.0),
]


def rotated(x: torch.Tensor, positions: list[list[int]], dims: int, base: float) -> torch.Tensor:
    """Turn channel pairs (i, i + dims/2) of ``[b t h p]`` as complex numbers."""
    x = x.clone()
    half = dims // 2
    for b, row in enumerate(positions):
        for t, position in enumerate(row):
            for i in range(half):
                turn = cmath.exp(1j * position * base ** (-i / half))
                first, second = x[b, t, :, i].clone(), x[b, t, :, i + half].clone()
                x[b, t, :, i] = first * turn.real - second * turn.imag
                x[b, t, :, i + half] = first * turn.imag + second * turn.real
    return x


def convolved(x: torch.Tensor, mixer: Attention, sequence: list[list[int]], valid: torch.Tensor) -> torch.Tensor:
    """Convolve with the last steps that count of the same sequence, tap by tap."""
    taps = mixer.conv1d.weight[:, 0]
    y = torch.zeros_like(x) if mixer.conv1d.bias is None else mixer.conv1d.bias.expand_as(x).clone()
    for b, row in enumerate(sequence):
        for t in range(len(row)):
            seen = [s for s in range(t) if row[s] == row[t] and valid[b, s]]
            for i, s in enumerate([t, *seen[::-1]][: taps.shape[1]]):
                y[b, t] += taps[:, -1 - i] * x[b, s]
    return y


def normed(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
    """Divide each head by its root mean square."""
    return x if norm is None else norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@pytest.mark.parametrize("options", CASES, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_by_explicit_masks(options: dict, marked: bool) -> None:
    batch, length = 2, 23
    mixer = Attention(16, **options).double()
    x = torch.randn(batch, length, 16, dtype=torch.float64)
    start = torch.rand(batch, length) < 0.15 if marked else torch.zeros(batch, length, dtype=torch.bool)
    valid = torch.rand(batch, length) < 0.8 if marked else torch.ones(batch, length, dtype=torch.bool)
    positions, sequence = [], []
    for b in range(batch):
        position, number, row, numbers = 0, 0, [], []
        for t in range(length):
            if start[b, t]:
                position, number = 0, number + 1
            row.append(position)
            numbers.append(number)
            position += int(valid[b, t])
        positions.append(row)
        sequence.append(numbers)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        u = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
        u = u if mixer.conv1d is None else convolved(u, mixer, sequence, valid)
        heads = u.view(batch, length, -1, mixer.head_dim)
        q, k, v = heads.split([mixer.n_heads, mixer.n_kv_heads, mixer.n_kv_heads], 2)
        q, k = normed(q, mixer.q_norm), normed(k, mixer.k_norm)
        q, k = (rotated(y, positions, mixer.rotary_dim, mixer.rotary_base) for y in (q, k))
        k, v = (y.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 2) for y in (k, v))
        mask = torch.zeros(batch, length, length, dtype=torch.bool)
        for b in range(batch):
            for t in range(length):
                for s in range(t + 1):
                    near = mixer.window is None or positions[b][t] - positions[b][s] < mixer.window
                    mask[b, t, s] = near and sequence[b][s] == sequence[b][t] and (bool(valid[b, s]) or s == t)
        scale = options.get("scale", mixer.head_dim**-0.5)
        y = scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=mask[:, None], scale=scale)
        wanted = mixer.o_proj(y.transpose(1, 2).flatten(2)) * valid[..., None]
        got, _ = mixer(x, None, Timeline(start=start, valid=valid) if marked else None)
    assert (got - wanted).abs().max() < 1e-12


def test_far_positions_keep_their_digits() -> None:
    """In float32, scores depend on the distance alone, a hundred thousand steps on."""
    mixer = Attention(8, 1)
    x = torch.randn(1, 4, 8)
    near = mixer(x)[0]
    state = mixer.initial_state(1)._replace(length=torch.tensor([100_000]))
    window = Attention(8, 1, window=4)
    window.load_state_dict(mixer.state_dict())
    state = window.initial_state(1)._replace(length=torch.tensor([100_000]))
    x_before = torch.randn(1, 4, 8)
    far = window(torch.cat([x_before, x], 1), state)[0][:, 4:]
    close = window(torch.cat([x_before, x], 1))[0][:, 4:]
    assert near.shape == far.shape
    assert (far - close).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d_model=10, n_heads=4), "not a multiple"),
        (dict(d_model=12, n_heads=4, n_kv_heads=3), "divide"),
        (dict(d_model=12, n_heads=4, window=0), "window"),
        (dict(d_model=12, n_heads=4, rotary_dim=3), "even"),
        (dict(d_model=12, n_heads=4, rotary_dim=8), "even"),
        (dict(d_model=12, n_heads=0), "n_heads"),
        (dict(d_model=12, n_heads=2, scale=0.0), r"scale=0.0.*positive"),
        (dict(d_model=12, n_heads=2, scale=math.nan), "positive"),
        (dict(d_model=12, n_heads=2, d_conv=-1), "d_conv=-1.*taps"),
        (dict(d_model=12, n_heads=2, qk_norm=True, norm_eps=0.0), "eps"),
    ],
)
def test_sizes_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**options)


def test_options_have_the_parameters_that_they_should() -> None:
    """Of published checkpoints, names are all there is to go by."""
    plain = {f"{name}_proj.weight" for name in "qkvo"}
    assert set(Attention(8, 2).state_dict()) == plain
    assert set(Attention(8, 2, out_bias=True).state_dict()) == plain | {"o_proj.bias"}
    assert set(Attention(8, 2, bias=True, out_bias=False).state_dict()) == plain | {f"{n}_proj.bias" for n in "qkv"}
    options = Attention(8, 4, 2, qk_norm=True, d_conv=4).state_dict()
    assert set(options) == plain | {"q_norm.weight", "k_norm.weight", "conv1d.weight", "conv1d.bias"}
    assert options["conv1d.weight"].shape == (8 + 4 + 4, 1, 4)
    assert options["q_norm.weight"].shape == options["k_norm.weight"].shape == (2,)


def test_the_state_of_attention_without_a_convolution_is_as_before() -> None:
    assert Attention(8, 2, qk_norm=True).initial_state(3)._fields == ("key", "value", "length")
    state = Attention(8, 2, d_conv=4).initial_state(3)
    assert state.conv.shape == (3, 3, 24)
    assert state.attention._fields == ("key", "value", "length")
