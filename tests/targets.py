"""GPU kernels compiled for a GPU that is not there: what the compiler says of them, without running them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from longstate.ops import _triton

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Binary(NamedTuple):
    """A kernel, its number of programs and of warps of each, bytes of shared memory, and all that Triton returns."""

    name: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    compiled: Any


@contextmanager
def compiling(architecture: int = 90) -> Iterator[list[Binary]]:
    """Compile, for an Nvidia GPU of this architecture, each kernel that is started, and start none.

    Tensors stay where they are, and outputs as they were made. Tiles are those of a GPU that the table does not know.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    found: list[Binary] = []
    target = GPUTarget("cuda", architecture, 32)

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        constants = {p.name for p in kernel.params if p.is_constexpr}
        signature, values, facts = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = given.pop(name)
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], values[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                facts[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    facts[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = compile(ASTSource(kernel, signature, values, facts), target=target, options=given)
        about = compiled.metadata
        found.append(Binary(about.name, grid, about.num_warps, about.shared, compiled))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_triton, "launch", launch))
        stack.enter_context(
            mock.patch.object(_triton.Tiles, "__call__", lambda self, x, **sizes: self.default | (self.forced or {}))
        )
        yield found


def resources(binary: Binary) -> str:
    """Return the assembler's report: registers, and bytes of the stack, which are those that are spilled."""
    import subprocess
    import tempfile
    from pathlib import Path

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.compiled.asm["cubin"])
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return shown.splitlines()[-1].strip()
