"""Mixers compute what the blocks of `transformers` compute, uncached and with copied weights, whole and in pieces."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from longstate import RGLRU, Attention, Mamba, Mamba2, Mixer, ShortConv

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import (  # noqa: E402
    FalconH1Config,
    FalconMambaConfig,
    JambaConfig,
    Lfm2Config,
    RecurrentGemmaConfig,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer  # noqa: E402
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer  # noqa: E402
from transformers.models.jamba.modeling_jamba import JambaMambaMixer  # noqa: E402
from transformers.models.lfm2.modeling_lfm2 import Lfm2Attention, Lfm2RotaryEmbedding, Lfm2ShortConv  # noqa: E402
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (  # noqa: E402
    RecurrentGemmaAttention,
    RecurrentGemmaRecurrentBlock,
)

seeds = pytest.mark.parametrize("seed", range(8))
LENGTH = 21


def copy_weights(theirs: nn.Module, ours: Mixer, renamed: dict[str, str]) -> None:
    """Draw every parameter anew, so that no one or zero hides anything, and copy all over."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            spread = 0.3 if parameter.ndim < 2 or "norm" in name or "conv" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(spread * torch.randn_like(parameter))
            if name.endswith(("norm.weight", "D")):
                parameter.add_(1)
    weights = {}
    for name, value in theirs.named_parameters():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = value.detach()
    ours.load_state_dict(weights)


def agree(ours: Mixer, theirs: Callable[[Tensor], Tensor], d_model: int) -> None:
    x = torch.randn(2, LENGTH, d_model)
    with torch.no_grad():
        wanted = theirs(x)
        whole, _ = ours(x)
        first, state = ours(x[:, :8])
        rest, _ = ours(x[:, 8:], state)
    assert whole.dtype == wanted.dtype == torch.float32
    scale = wanted.abs().max()
    assert wanted.std() > 1e-3 and scale < 1e3, "outputs that say nothing"
    assert (whole - wanted).abs().max() <= 1e-5 * scale
    assert (torch.cat([first, rest], 1) - wanted).abs().max() <= 1e-5 * scale


@seeds
def test_falcon_mamba(seed: int) -> None:
    draw = random.Random(seed)
    width, bias, conv_bias = draw.choice([6, 16, 40]), draw.random() < 0.5, draw.random() < 0.5
    n, k, expand, rank = draw.choice([2, 5, 16]), draw.choice([2, 4]), draw.choice([1, 2]), draw.choice([None, 1, 5])
    eps = draw.choice([1e-6, 1e-2])
    config = FalconMambaConfig(
        hidden_size=width,
        state_size=n,
        conv_kernel=k,
        expand=expand,
        time_step_rank=rank or "auto",
        use_bias=bias,
        use_conv_bias=conv_bias,
        mixer_rms_eps=eps,
        num_hidden_layers=1,
    )
    theirs = FalconMambaMixer(config, 0, initialize_mixer_weights=False).eval()
    ours = Mamba(width, n, k, expand, rank, bias=bias, conv_bias=conv_bias, inner_norm="plain", inner_norm_eps=eps)
    copy_weights(theirs, ours, {})
    agree(ours, theirs, width)


@seeds
def test_jamba(seed: int) -> None:
    draw = random.Random(seed)
    width, bias, conv_bias = draw.choice([6, 16, 40]), draw.random() < 0.5, draw.random() < 0.5
    n, k, expand, rank = draw.choice([2, 5, 16]), draw.choice([2, 4]), draw.choice([1, 2]), draw.choice([1, 5])
    eps = draw.choice([1e-6, 1e-2])
    config = JambaConfig(
        hidden_size=width,
        mamba_d_state=n,
        mamba_d_conv=k,
        mamba_expand=expand,
        mamba_dt_rank=rank,
        mamba_proj_bias=bias,
        mamba_conv_bias=conv_bias,
        rms_norm_eps=eps,
        use_mamba_kernels=False,
        num_hidden_layers=8,
    )
    theirs = JambaMambaMixer(config, 0).eval()
    ours = Mamba(width, n, k, expand, rank, bias=bias, conv_bias=conv_bias, inner_norm="weighted", inner_norm_eps=eps)
    copy_weights(theirs, ours, {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"})
    agree(ours, theirs, width)


@seeds
def test_mamba2_without_norm_and_with_the_gate_after_it(seed: int) -> None:
    draw = random.Random(seed)
    width, heads, head_dim = draw.choice([6, 12]), draw.choice([2, 4]), draw.choice([3, 4])
    inner, groups, n, norm = heads * head_dim, draw.choice([1, 2]), draw.choice([2, 5]), seed % 2 == 0
    limit = draw.choice([(0.0, float("inf")), (0.3, 0.9)])
    config = FalconH1Config(
        hidden_size=width,
        mamba_d_ssm=inner,
        mamba_n_heads=heads,
        mamba_d_head=head_dim,
        mamba_n_groups=groups,
        mamba_d_state=n,
        mamba_rms_norm=norm,
        mamba_norm_before_gate=True,
        mamba_chunk_size=8,
        time_step_limit=limit,
        num_hidden_layers=1,
    )
    theirs = FalconH1Mixer(config, 0).eval()
    theirs.mup_vector = torch.ones(theirs.in_proj.out_features)
    ours = Mamba2(
        width,
        n,
        head_dim=head_dim,
        n_groups=groups,
        norm_eps=config.rms_norm_eps,
        dt_limit=limit,
        d_inner=inner,
        gated_norm=norm,
        norm_before_gate=norm,
    )
    copy_weights(theirs, ours, {})
    agree(ours, theirs, width)


@seeds
def test_lfm2_short_convolution(seed: int) -> None:
    draw = random.Random(seed)
    width, taps, bias = draw.choice([4, 10]), draw.choice([2, 3, 5]), draw.random() < 0.5
    config = Lfm2Config(hidden_size=width, conv_L_cache=taps, conv_bias=bias, num_hidden_layers=1, layer_types=["conv"])
    theirs, ours = Lfm2ShortConv(config, 0).eval(), ShortConv(width, taps, bias)
    copy_weights(theirs, ours, {"conv.": "conv1d."})
    agree(ours, theirs, width)


def causal_mask(window: int | None) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    hidden = (distance < 0) | (distance >= (LENGTH if window is None else window))
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(hidden, float("-inf"))


@seeds
def test_lfm2_attention(seed: int) -> None:
    draw = random.Random(seed)
    heads, kv_heads, head_dim = (*draw.choice([(2, 1), (4, 2), (3, 3)]), draw.choice([4, 6]))
    width, base, eps = heads * head_dim, draw.choice([1e4, 1e6]), draw.choice([1e-5, 1e-2])
    config = Lfm2Config(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        num_hidden_layers=1,
        layer_types=["full_attention"],
        attn_implementation="eager",
    )
    theirs = Lfm2Attention(config, 0).eval()
    ours = Attention(width, heads, kv_heads, rotary_base=base, qk_norm=True, norm_eps=eps)
    copy_weights(theirs, ours, {"q_layernorm": "q_norm", "k_layernorm": "k_norm", "out_proj": "o_proj"})
    turns = Lfm2RotaryEmbedding(config)(torch.zeros(()), torch.arange(LENGTH)[None])
    agree(ours, lambda x: theirs(x, turns, causal_mask(None))[0], width)


@seeds
def test_recurrent_gemma_attention(seed: int) -> None:
    draw = random.Random(seed)
    heads, kv_heads, head_dim, window = 2, draw.choice([1, 2]), draw.choice([4, 8]), draw.choice([3, 5, 30])
    config = RecurrentGemmaConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        attention_window_size=window,
        attention_bias=seed % 3 == 0,
        num_hidden_layers=3,
        attn_implementation="eager",
    )
    theirs = RecurrentGemmaAttention(config, 2).eval()
    ours = Attention(
        heads * head_dim,
        heads,
        kv_heads,
        window=window,
        rotary_dim=head_dim // 2,
        bias=seed % 3 == 0,
        out_bias=True,
    )
    copy_weights(theirs, ours, {})
    position = torch.arange(LENGTH)[None]
    agree(ours, lambda x: theirs(x, position, causal_mask(window))[0], heads * head_dim)


@seeds
def test_recurrent_gemma_recurrence(seed: int) -> None:
    draw = random.Random(seed)
    width, heads, taps = draw.choice([4, 8]), draw.choice([1, 2, 4]), draw.choice([2, 4])
    inner = heads * draw.choice([1, 3, 4])
    config = RecurrentGemmaConfig(
        hidden_size=width, lru_width=inner, num_attention_heads=heads, conv1d_width=taps, num_hidden_layers=3
    )
    theirs, ours = RecurrentGemmaRecurrentBlock(config, 0).eval(), RGLRU(width, inner, heads, taps)
    copy_weights(
        theirs,
        ours,
        {"conv_1d": "conv1d", "rg_lru.": "", "recurrent_param": "Lambda", "recurrent_gate": "recurrence_gate"},
    )
    position = torch.arange(LENGTH).expand(2, LENGTH)
    agree(ours, lambda x: theirs(x, position, None, use_cache=False)[0], width)
