"""The tiles of the delta rule's kernels, and into how many segments of time their walks are cut."""

from __future__ import annotations

import math

import torch

from ..._shapes import Tensor
from .. import _triton


def _tiles(kernel: str, warps: int, stages: int, **sides: int) -> _triton.Tiles:
    """Declare the tiles of a kernel, by their columns: of keys (``KB``), of values (``PB``)."""
    space: dict[str, tuple[int, ...]] = dict(num_warps=(1, 2, 4, 8), num_stages=(1, 2, 3))
    return _triton.Tiles(
        f"delta_rule.{kernel}",
        dict(sides, num_warps=warps, num_stages=stages),
        interpreter=dict.fromkeys(sides, 4),
        space=space | dict.fromkeys(sides, (16, 32, 64)),
    )


def _chunk(kernel: str, C: int) -> _triton.Tiles:
    """Declare the steps of a chunk, and of the blocks in it that are inverted first."""
    sides = dict(C=C, SUB=16)
    return _triton.Tiles(f"delta_rule.{kernel}", sides, dict(C=8, SUB=4), space=dict(C=(32, 64), SUB=(16,)))


# Float32 takes twice the room, and three times in the making of its products.
CHUNK, CHUNK_FLOAT32 = _chunk("chunk", C=64), _chunk("chunk_float32", C=32)
PREPARE = _tiles("prepare", warps=4, stages=1, KB=64, PB=64)
PREPARE_BY_CHANNEL = _tiles("prepare_by_channel", warps=4, stages=1, KB=32, PB=64)
WALK, WALK_BACK = _tiles("walk", warps=4, stages=3, PB=32), _tiles("walk_back", warps=4, stages=3, PB=32)
COMBINE = _tiles("combine", warps=8, stages=1, KB=64, PB=16)
OUTPUTS = _tiles("outputs", warps=4, stages=2, KB=64, PB=64)
SQUARES = _tiles("squares", warps=4, stages=1, PB=64)
ROWS = _tiles("rows", warps=8, stages=1, KB=64, PB=64)
ROWS_BY_CHANNEL = _tiles("rows_by_channel", warps=8, stages=1, KB=32, PB=64)
STEP = _tiles("step", warps=4, stages=1, PB=16)


def segments(chunks: int, programs: int, room: int) -> int:
    """Return into how many segments of time to cut the walks of so many programs, of which a GPU has room for ``room``.

    A walk waits for one product after another: programs beside it hardly slow it down, as long as there is room for
    all. Segments are walked from zero, from the identity (for the map of their states) and from their true states:
    three times chunks / segments one after the other. From segment to segment it takes as long as two chunks do, about,
    and three more kernels start in the time of eight.
    """
    many = max(1, min(room // max(programs, 1), math.isqrt(3 * chunks // 2)))
    return many if 3 * _triton.cdiv(chunks, many) + 2 * many + 8 < chunks else 1


def gpu(x: Tensor) -> tuple[int, int]:
    """Return the number of multiprocessors where ``x`` is, and the memory of each; those of an H100 without a GPU."""
    if not x.is_cuda:
        return 132, 228 * 1024
    found = torch.cuda.get_device_properties(x.device)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor
