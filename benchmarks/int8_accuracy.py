"""What narrower weights cost a trained model: its loss on held-out text as float32, bfloat16 and int8; prints Markdown.

    longstate train --model mamba --minutes 10 --out runs/a
    python benchmarks/int8_accuracy.py runs/a [--tokens 32768]

The text is what `longstate train` holds out of the standard library's sources, in windows of 1024 bytes. A table shows
the mean loss in nats a token, its difference from float32, the mean over tokens of KL(float32 ‖ this) in nats, and how
often the most likely token is the same. The 95 % interval of the difference takes windows for independent.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch

import longstate
from longstate.compression import quantize
from longstate.data.text import split, standard_library

WINDOW = 1024


@torch.inference_mode()
def log_probabilities(model: longstate.LanguageModel, windows: torch.Tensor) -> torch.Tensor:
    """Return those of the token after each, ``[windows t v]``."""
    return torch.cat([model(x)[0].float().log_softmax(-1) for x in windows.split(4)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder that `longstate train` wrote, of a model that reads bytes")
    parser.add_argument("--tokens", type=int, default=32 * WINDOW)
    arguments = parser.parse_args()
    model = longstate.load(arguments.run).eval().requires_grad_(False)
    if model.vocab_size != 256:
        parser.error(f"{arguments.run}: the model has {model.vocab_size} tokens, wanted one that reads bytes (256)")
    held_out = torch.tensor(list("".join(split(standard_library(), 0.05)[1]).encode()[: arguments.tokens + 1]))
    count = (len(held_out) - 1) // WINDOW * WINDOW
    windows, targets = (held_out[i : i + count].view(-1, WINDOW) for i in (0, 1))
    kinds: dict[str, Callable[[longstate.LanguageModel], longstate.LanguageModel]] = {
        "float32": lambda x: x,
        "bfloat16": lambda x: x.bfloat16(),
        "int8": quantize,
        "int8, groups of 64": lambda x: quantize(x, group=64),
        "int8, bfloat16 activations": lambda x: quantize(x.bfloat16()),
    }
    print(f"{sum(x.numel() for x in model.parameters()) / 1e6:.2f} M parameters, {count} held-out tokens\n")
    print("| weights | nats a token | over float32 | KL | same most likely token |\n| --- | --- | --- | --- | --- |")
    wide = nats_wide = None
    for name, narrow in kinds.items():
        found = log_probabilities(narrow(copy.deepcopy(model)), windows)
        nats = -found.gather(-1, targets[..., None]).mean((1, 2))
        if wide is None or nats_wide is None:
            wide, nats_wide = found, nats
        more = nats - nats_wide
        divergence = (wide.exp() * (wide - found)).sum(-1).mean()
        same = (found.argmax(-1) == wide.argmax(-1)).float().mean()
        interval = 1.96 * more.std() / len(more) ** 0.5
        print(f"| {name} | {nats.mean():.5f} | {more.mean():+.5f} ± {interval:.5f} | {divergence:.1e} | {same:.2%} |")


if __name__ == "__main__":
    main()
