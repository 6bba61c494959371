"""What low-rank adapters adapt in our models."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from ..models.experts import Experts
from .configuration import LongstateConfig

# Every linear layer of every mixer and channel mixer by the last part of its name, but routers, and the small networks
# that write the taps of a convolution (Hyena, TNN): their weights are read, they are not called.
LORA_TARGETS = (
    "in_proj",
    "x_proj",
    "dt_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "u_proj",
    "o_proj",
    "h_proj",
    "mx_proj",
    "linear_x",
    "linear_y",
    "linear_out",
    "linear",
    "fc1",
    "fc2",
    "latent_in",
    "latent_out",
)


def lora_targets(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of ``peft.LoraConfig`` that say what to adapt, such that no layer is left out.

    Linear layers and routed experts get low-rank adapters. A mixer without any (S4D and S5 that end in no gate) has few
    parameters, and is trained whole.

    Args:
        model: A ``LongstateForCausalLM`` or a ``LanguageModel``.
    """
    found, whole = set(), []
    for name, block in model.backbone.layers.named_children():  # type: ignore[union-attr]
        mixer = {leaf for leaf in LORA_TARGETS if _has(getattr(block, "mixer", None), leaf)}
        found |= mixer | {leaf for leaf in LORA_TARGETS if _has(getattr(block, "mlp", None), leaf)}
        if not mixer and block.mixer is not None:
            whole.append(f"layers.{name}.mixer")
    routed = any(isinstance(module, Experts) for module in model.modules())
    return {
        # PEFT wants at least one.
        "target_modules": [leaf for leaf in LORA_TARGETS if leaf in found] or ["lm_head"],
        "modules_to_save": whole or None,
        "target_parameters": ["mlp.fc1", "mlp.fc2"] if routed else None,
    }


def _has(module: nn.Module | None, leaf: str) -> bool:
    """Return whether there is a linear layer of that name in the module."""
    return module is not None and any(
        name.rpartition(".")[2] == leaf and isinstance(part, nn.Linear) for name, part in module.named_modules()
    )


def register_with_peft() -> None:
    """Make these the targets of a ``LoraConfig`` that names none, if PEFT is installed."""
    if find_spec("peft") is None:
        return
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    TARGETS[LongstateConfig.model_type] = list(LORA_TARGETS)
