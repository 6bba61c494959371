"""``longstate doctor``: what is installed, what it runs on, and which backends are in use."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import typer

from .. import __version__, native, ops
from ._table import table

_CORE = ("torch", "numpy", "safetensors", "typer", "pyyaml")
_EXTRAS = {
    "lightning": "train",
    "tensorboard": "train",
    "tokenizers": "train",
    "matplotlib": "plot",
    "transformers": "hf",
    "scikit-learn": "estimators",
    "torchdiffeq": "ode",
}


def command() -> None:
    """Say which versions, devices and backends there are, and why others are not in use."""
    versions = [("package", "version"), ("longstate", __version__), ("python", platform.python_version())]
    versions += [(name, _installed(name)) for name in _CORE]
    versions += [
        (name, found if (found := _installed(name)) else f"not installed (pip install 'longstate[{extra}]')")
        for name, extra in _EXTRAS.items()
    ]
    typer.echo(table(versions))
    typer.echo()
    typer.echo(table([("device", "what it is"), *_devices()]))
    typer.echo()
    rows = [(op, name, status) for op, backends in ops.backends().items() for name, status in backends.items()]
    typer.echo(table([("op", "backend", "status"), *rows]))


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _devices() -> list[tuple[str, str]]:
    kernels = (
        f"compiled kernels for {native.instructions()}" if native.kernels else f"no compiled kernels: {native.reason}"
    )
    found = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {kernels}")]
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return [*found, ("cuda", f"none: {reason}")]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"))
    return found
