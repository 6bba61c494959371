"""Time and memory to load a published checkpoint with Longstate and with transformers, random weights of real sizes.

    python benchmarks/load_checkpoint.py [--repeats 5] [--folder DIR]

Writes float32 checkpoints of a Mamba of 130M and one of 1.4B parameters (0.5 and 5.5 GB) into DIR, which is deleted
afterwards if it is a temporary one. Each load runs in a process of its own, ours and transformers' in turn, with the
files in the page cache; times are from the call to the model (imports not counted), and again to the logits of eight
tokens, since either may leave reading for later. Memory: the peak of resident memory over that before the load; pages
of the file that are mapped count. The two must give the same logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SIZES = {"130M": dict(hidden_size=768, num_hidden_layers=24), "1.4B": dict(hidden_size=2048, num_hidden_layers=48)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write(folder: Path, sizes: dict[str, int]) -> None:
    """Save a random model as transformers does."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=50280, **sizes)).save_pretrained(folder, max_shard_size="2GB")


def load(library: str, folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load a model for inference."""
    if library == "longstate":
        return longstate.load_pretrained(folder, dtype=dtype).eval()
    return MambaForCausalLM.from_pretrained(folder, dtype=dtype)


def peak() -> float:
    """Return the peak of resident memory of this process so far, in MB."""
    # Not getrusage: a process begins with its parent's peak there.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


@torch.inference_mode()
def measure(library: str, folder: str, dtype: str) -> dict[str, float]:
    """Load once, and read eight tokens."""
    before, begin = peak(), time.perf_counter()
    model = load(library, folder, DTYPES[dtype])
    loaded = time.perf_counter() - begin
    memory = peak() - before
    output = model(torch.arange(8)[None])
    logits = output[0] if library == "longstate" else output.logits
    first, size = time.perf_counter() - begin, sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return {
        "load s": loaded,
        "first s": first,
        "load MB": memory,
        "first MB": peak() - before,
        "size MB": size,
        "check": float(logits.float().norm()),
    }


def main() -> None:
    """Write the checkpoints, load them in turn, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        global longstate, MambaForCausalLM
        if arguments.one[0] == "longstate":
            import longstate
        else:
            from transformers import MambaForCausalLM
        print(json.dumps(measure(*arguments.one)))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("model  dtype      library        load s  to logits s   peak MB  to logits MB  model MB   logits")
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.sizes:
            folder = (arguments.folder or Path(temporary)) / name
            if not folder.exists():
                write(folder, SIZES[name])
            for dtype in DTYPES:
                rows: dict[str, list[dict[str, float]]] = {"longstate": [], "transformers": []}
                for _ in range(arguments.repeats):
                    for library, found in rows.items():
                        command = [sys.executable, __file__, "--one", library, str(folder), dtype]
                        found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
                for library, found in rows.items():
                    m = {key: statistics.median(row[key] for row in found) for key in found[0]}
                    times = f"{m['load s']:8.2f} {m['first s']:12.2f}"
                    sizes = f"{m['load MB']:9.0f} {m['first MB']:13.0f} {m['size MB']:9.0f}"
                    print(f"{name:<6} {dtype:<9}  {library:<12} {times} {sizes} {m['check']:8.4g}", flush=True)


if __name__ == "__main__":
    main()
