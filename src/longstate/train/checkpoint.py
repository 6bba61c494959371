"""The checkpoint of a run: one safetensors file with all that a run needs to go on, written whole or not at all.

It is one file so that there is one instant at which it becomes the new one; a process may be killed at any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .. import state as states
from .._files import replacing
from .._shapes import Tensor

FILE_NAME = "training.safetensors"


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        step: Steps taken.
        elapsed: Seconds of training, over all parts of a resumed run.
        loss_sum: Sum of the losses since the last row of the log.
        loss_count: Their number.
        log_size: Bytes of the log; what a killed run wrote after them belongs to steps that are taken again.
        text: Digest of the text, in both its parts.
    """

    step: int = 0
    elapsed: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    log_size: int = 0
    text: str = ""


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, carried: Any
) -> None:
    """Write parameters, optimizer, random number generators, carried state and progress."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        tensors |= {f"optimizer.{name}.{key}": x for key, x in optimizer.state[parameter].items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    tensors |= {f"carried.{name}": x for name, x in states.flatten(carried).items()}
    with replacing(folder / FILE_NAME) as part:
        save_file(tensors, part, {"progress": json.dumps(progress._asdict())})


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, like: Any
) -> tuple[Progress, Any]:
    """Put a run back to where its checkpoint was written.

    Args:
        folder: The run's folder.
        model: The model, whose parameters are overwritten.
        optimizer: Its optimizer, whose state is overwritten.
        like: A state with the structure of the carried one.

    Returns:
        The progress, and the carried state (``None`` if the run carries none).

    Raises:
        ValueError: If the file is damaged, or is not this model's.
    """
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        progress = Progress(**json.loads(metadata["progress"]))
        _restore(tensors, model, optimizer)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of this model ({error}). Begin a new run with another --out."
        ) from error
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    torch.set_rng_state(tensors["random.cpu"])
    kept = {name.removeprefix("carried."): x for name, x in tensors.items() if name.startswith("carried.")}
    return progress, states.unflatten(kept, like) if kept else None


def _restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"model.{name}"])
        kept = {key.rsplit(".", 1)[1]: x for key, x in tensors.items() if key.rsplit(".", 1)[0] == f"optimizer.{name}"}
        # AdamW counts its steps on the CPU; everything else lies beside the parameter.
        optimizer.state[parameter] = {key: x if key == "step" else x.to(parameter.device) for key, x in kept.items()}
