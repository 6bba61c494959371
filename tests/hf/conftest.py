"""Small models of every kind of layer, sharp enough that what was read decides what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

VOCABULARY = 61
KINDS: list[dict[str, Any]] = [
    {"mixer": "mamba2", "d_state": 8, "head_dim": 8},
    {"mixer": "attention", "n_heads": 2},
    {"mixer": "mamba", "d_state": 4, "inner_norm": "weighted"},
    {"mixer": None, "mlp": {"kind": "plain", "hidden": 16}},
    {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "window": 5, "d_conv": 3},
    {"mixer": "rglru", "n_heads": 2, "mlp": {"hidden": 16}},
    {"mixer": "short_conv"},
    {"mixer": "s5", "d_state": 4},
    {"mixer": "s4d", "d_state": 4},
]
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars: they write into what a test captures."""
    import transformers

    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture
def make() -> Make:
    """Return a function that builds a model, in eval mode."""
    # Not above: this file is read before the package is wrapped in its run-time checks.
    from longstate.hf import LongstateConfig, LongstateForCausalLM

    def build(layers: Sequence[Any] = KINDS, seed: int = 0, **options: Any) -> LongstateForCausalLM:
        torch.manual_seed(seed)
        # Not tied, so that a token is not itself the likeliest to follow.
        given = {"vocab_size": VOCABULARY, "d_model": 16, "pad_vocab_size_multiple": 8, "tie_embeddings": False}
        given |= options
        model = LongstateForCausalLM(LongstateConfig(layers=layers, **given)).eval()
        with torch.no_grad():
            model.lm_head.weight *= 40
        return model

    return build
