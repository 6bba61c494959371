"""Mamba and Mamba-2 language models compute the logits of `transformers`, on random small configurations."""

from __future__ import annotations

import inspect
import math
import random
from typing import Any

import pytest
import torch

from longstate import LanguageModel

transformers = pytest.importorskip("transformers")

from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated  # noqa: E402

# The gated norm of transformers takes groups of channels apart since it has a group_size; before, all together, which
# differs from the published models when there are several groups.
NORM_BY_GROUPS = "group_size" in inspect.signature(MambaRMSNormGated.__init__).parameters


def copy_weights(theirs: torch.nn.Module, ours: LanguageModel) -> None:
    """Move every parameter off its initial value, and copy all over: one name differs."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            spread = 0.3 if name.endswith(("A_log", "D", "bias", "norm.weight", "norm_f.weight")) else 0.1
            parameter.add_(spread * torch.randn_like(parameter))
    weights = {n.replace("backbone.embeddings.", "backbone.embedding."): p for n, p in theirs.state_dict().items()}
    if ours.config["tie_embeddings"]:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    assert ours.load_state_dict(weights).missing_keys == []


def agree(theirs: torch.nn.Module, ours: LanguageModel, vocab: int, length: int) -> None:
    tokens = torch.randint(vocab, (2, length))
    with torch.no_grad():
        wanted = theirs.eval()(tokens, use_cache=False).logits
        got, _ = ours.eval()(tokens)
        first, state = ours(tokens[:, : length // 3])
        rest, _ = ours(tokens[:, length // 3 :], state)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype == torch.float32
    scale = wanted.abs().max()
    assert scale > 0.1 and wanted.std() > 0.05, "logits that say nothing"
    assert (got - wanted).abs().max() <= 1e-5 * scale
    assert (torch.cat([first, rest], 1) - wanted).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("seed", range(10))
def test_mamba(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width, layers, vocab = draw.choice([8, 24, 40]), draw.choice([1, 2, 3]), draw.choice([11, 50])
    options: dict[str, Any] = dict(
        d_state=draw.choice([2, 5, 16]),
        d_conv=draw.choice([2, 3, 4]),
        expand=draw.choice([1, 2, 3]),
        dt_rank=draw.choice([None, 1, 7]),
        bias=draw.random() < 0.5,
        conv_bias=draw.random() < 0.5,
    )
    eps, tied = draw.choice([1e-5, 1e-2]), draw.random() < 0.5
    config = MambaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        state_size=options["d_state"],
        conv_kernel=options["d_conv"],
        expand=options["expand"],
        time_step_rank=options["dt_rank"] or "auto",
        use_bias=options["bias"],
        use_conv_bias=options["conv_bias"],
        layer_norm_epsilon=eps,
        tie_word_embeddings=tied,
        residual_in_fp32=True,
    )
    ours = LanguageModel(vocab, width, [{"mixer": "mamba", **options}] * layers, norm_eps=eps, tie_embeddings=tied)
    theirs = MambaForCausalLM(config)
    copy_weights(theirs, ours)
    agree(theirs, ours, vocab, draw.choice([5, 33, 70]))


@pytest.mark.parametrize("seed", range(12))
def test_mamba2(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, heads = draw.choice([4, 8]), draw.choice([4, 8])
    expand = draw.choice([1, 2])
    width, layers, vocab = head_dim * heads // expand, draw.choice([1, 2, 3]), draw.choice([11, 50])
    groups = draw.choice([1, 2, 4])
    limit = draw.choice([(0.0, math.inf), (0.01, 0.05)])
    options: dict[str, Any] = dict(
        d_state=draw.choice([2, 5, 16]),
        d_conv=draw.choice([2, 3, 4]),
        expand=expand,
        head_dim=head_dim,
        n_groups=groups,
        norm_groups=groups if NORM_BY_GROUPS else 1,
        dt_limit=limit,
        bias=draw.random() < 0.5,
        conv_bias=draw.random() < 0.5,
    )
    eps, tied = draw.choice([1e-5, 1e-2]), draw.random() < 0.5
    config = Mamba2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        state_size=options["d_state"],
        conv_kernel=options["d_conv"],
        expand=expand,
        n_groups=groups,
        use_bias=options["bias"],
        use_conv_bias=options["conv_bias"],
        layer_norm_epsilon=eps,
        time_step_limit=limit,
        chunk_size=draw.choice([8, 16]),
        tie_word_embeddings=tied,
        residual_in_fp32=True,
    )
    layer = {"mixer": "mamba2", "norm_eps": eps, **options}
    ours = LanguageModel(vocab, width, [layer] * layers, norm_eps=eps, tie_embeddings=tied)
    theirs = Mamba2ForCausalLM(config)
    copy_weights(theirs, ours)
    agree(theirs, ours, vocab, draw.choice([5, 33, 70]))
