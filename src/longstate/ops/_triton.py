"""Where the Triton kernels run, in what tiles, and how they are started."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module, resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from .. import native
from .._shapes import Tensor

# Triton's own switch, not ours: its kernels run one by one in Python then, on the CPU, and compute the same.
interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # noqa: TID251

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_KEYS = 512  # of a head: a state's tile and those beside it have to find room in shared memory


def _missing() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (interpreted or torch.version.cuda or torch.version.hip):
        return "this torch is built without GPUs"
    return ""


reason = _missing()  # why no kernel can run; "" if they can


def refusal(*tensors: Tensor | None, types: tuple[torch.dtype, ...] = TYPES, keys: int = 0) -> str:
    """Return why the kernels do not take such arguments; "" if they do."""
    if reason:
        return reason
    if keys > MOST_KEYS:
        return f"its kernels take at most {MOST_KEYS} keys"
    for x in tensors:
        if x is not None and not (x.dtype in types and (x.is_cuda or interpreted)):
            names = ", ".join(str(x).removeprefix("torch.") for x in types)
            return f"its kernels take {names}, on a GPU"
    return ""


def backend(op: str, function: str) -> dict[str, Callable[..., Any]]:
    """Return the backend of an op (a folder of this one), if kernels can run: a function of its ``triton.py``, which is
    imported when it is first called."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"{__package__}.{op}.triton"), function)(*arguments)

    return {} if reason else {"triton": call}


class Tiles:
    """The sizes of a kernel's tiles, and with how many warps and stages it runs: by device and by sizes of the problem.

    They come from the table ``tuned.json``, from the row of the nearest sizes, where it has some for the device.
    """

    known: ClassVar[dict[str, Tiles]] = {}

    def __init__(
        self,
        kernel: str,
        default: Mapping[str, int],
        interpreter: Mapping[str, int],
        space: Mapping[str, Sequence[int]],
    ) -> None:
        """Declare a kernel's tiles.

        Args:
            kernel: Its name in the table.
            default: What to use where the table has nothing for the device.
            interpreter: What differs under the interpreter: tiles so small that there are several of them in a test.
            space: What to choose from when tuning.
        """
        self.kernel, self.default, self.interpreter, self.space = kernel, dict(default), dict(interpreter), dict(space)
        self.forced: dict[str, int] | None = None
        self.known[kernel] = self

    def __call__(self, x: Tensor, **sizes: int) -> dict[str, int]:
        """Return what to use for a problem of such sizes where ``x`` is."""
        if _asked is not None:
            _asked.append((self, sizes))
        if self.forced is not None:
            return self.default | self.forced
        if not x.is_cuda:
            return self.default | self.interpreter
        return self.default | _nearest(self.kernel, architecture(x.device), *sizes.items())

    @contextmanager
    def force(self, choice: Mapping[str, int]) -> Iterator[None]:
        """Use this and nothing else."""
        before, self.forced = self.forced, dict(choice)
        try:
            yield
        finally:
            self.forced = before


_asked: list[tuple[Tiles, dict[str, int]]] | None = None


@contextmanager
def asked() -> Iterator[list[tuple[Tiles, dict[str, int]]]]:
    """Note which kernels ask for tiles, and for which sizes."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


_in_place = ContextVar("in_place", default=False)


@contextmanager
def in_place() -> Iterator[None]:
    """Let single steps write the new state where the old one is."""
    before = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(before)


def captured(x: Tensor) -> bool:
    """Return whether a step is being taken ``in_place`` where kernels run."""
    return _in_place.get() and not reason and (x.is_cuda or interpreted)


def final_state(
    initial: Tensor | None, shape: Sequence[int], like: Tensor, single: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return memory for a final state: that of the initial one for a ``single`` step ``in_place``, whose kernel must
    read all that a program writes, and no other program reads, before it writes."""
    if _in_place.get() and single and initial is not None and initial.dtype == dtype and initial.is_contiguous():
        if not initial.is_conj():
            return initial
    return like.new_empty(shape, dtype=dtype)


@functools.cache
def architecture(device: torch.device) -> str:
    """Return what the table knows a GPU by, such as "sm_90"."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


Table = dict[str, dict[str, list[dict[str, dict[str, int]]]]]


@functools.cache
def table() -> Table:
    """Return the table: for each architecture and kernel, rows of "sizes" and what to "use" for them."""
    return read_table(resources.files(__package__).joinpath("tuned.json"))


def read_table(file: Traversable) -> Table:
    """Return a table as it is written in a file.

    Raises:
        ValueError: If the file is no such table.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for kernels in found.values():
            for rows in kernels.values():
                for row in rows:
                    if not all(isinstance(x, int) and x > 0 for part in ("sizes", "use") for x in row[part].values()):
                        raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no table of tiles ({error!r}). Give one that `longstate bench tune` wrote."
        ) from None
    return found


@functools.lru_cache(4096)
def _nearest(kernel: str, architecture: str, *sizes: tuple[str, int]) -> dict[str, int]:
    wanted = dict(sizes)

    def distance(row: dict[str, dict[str, int]]) -> float:
        return sum(abs(math.log2(max(wanted.get(name, size), 1) / size)) for name, size in row["sizes"].items())

    rows = table().get(architecture, {}).get(kernel, [])
    return min(rows, key=distance)["use"] if rows else {}


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any) -> None:
    """Start a kernel where ``x`` is, which is its first argument; not at all for an empty grid."""
    if math.prod(grid) == 0:
        return
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        kernel[grid](x, *arguments, **options)
        return
    with torch.cuda.device(x.device):
        kernel[grid](x, *arguments, **options)


def rows(x: Tensor) -> Tensor:
    """Return rows ``[b t … n]`` of numbers side by side, so near that 32 bits hold offsets in a tile of 128 steps."""
    x = native.in_rows(x)
    return x if x.stride(1) < 1 << 24 else x.contiguous()


def cdiv(x: int, y: int) -> int:
    """Return x / y, rounded up."""
    return -(-x // y)


def power_of_2(x: int, least: int = 1) -> int:
    """Return the next power of two that is not less, which a tile's sides must be."""
    return max(least, 1 << (x - 1).bit_length() if x > 1 else 1)
