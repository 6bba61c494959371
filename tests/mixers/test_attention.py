"""Attention against torch's, given explicit masks and a rotation written out by hand."""

from __future__ import annotations

import cmath

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
        q = mixer.q_proj(x).view(batch, length, mixer.n_heads, mixer.head_dim)
        k, v = (p(x).view(batch, length, mixer.n_kv_heads, mixer.head_dim) for p in (mixer.k_proj, mixer.v_proj))
        q, k = (rotated(y, positions, mixer.rotary_dim, mixer.rotary_base) for y in (q, k))
        k, v = (y.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 2) for y in (k, v))
        mask = torch.zeros(batch, length, length, dtype=torch.bool)
        for b in range(batch):
            for t in range(length):
                for s in range(t + 1):
                    near = mixer.window is None or positions[b][t] - positions[b][s] < mixer.window
                    mask[b, t, s] = near and sequence[b][s] == sequence[b][t] and (bool(valid[b, s]) or s == t)
        y = scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=mask[:, None])
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
    ],
)
def test_sizes_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**options)
