"""The tiles of the kernels of linear attention."""

from __future__ import annotations

from .._triton import Tiles

_SMALL = dict(CHUNK=16, KEYS=16, VALUES=16, PROGRAMS=12)  # under the interpreter
_CHUNKS: dict[str, tuple[int, ...]] = dict(CHUNK=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))


def _tiles(kernel: str, exact: bool, **default: int) -> Tiles:
    """Declare tiles of a kernel; of its form that multiplies float32, which has a row of its own in the table."""
    name = f"linear_attention.{kernel}" + (".float32" if exact else "")
    space = dict(_CHUNKS)
    sides = {name: size for name, size in default.items() if name in ("KEYS", "VALUES")}
    space |= {name: (max(16, size // 2), size, 2 * size) for name, size in sides.items()}  # products need 16
    if "PROGRAMS" in default:
        space["PROGRAMS"] = (132, 264, 528)
    small = {name: size for name, size in _SMALL.items() if name in default}
    return Tiles(kernel=name, default=default, interpreter=small, space=space)


# By whether float32 is multiplied.
WALK = {
    False: _tiles("walk", False, CHUNK=64, VALUES=32, PROGRAMS=264, num_warps=4, num_stages=2),
    True: _tiles("walk", True, CHUNK=16, VALUES=16, PROGRAMS=264, num_warps=8, num_stages=1),
}
BY_HEAD = {
    False: _tiles("by_head", False, CHUNK=64, VALUES=32, PROGRAMS=256, num_warps=4, num_stages=1),
    True: _tiles("by_head", True, CHUNK=16, VALUES=16, PROGRAMS=256, num_warps=8, num_stages=1),
}
BY_CHANNEL = {
    False: _tiles("by_channel", False, CHUNK=64, KEYS=64, VALUES=64, num_warps=8, num_stages=1),
    True: _tiles("by_channel", True, CHUNK=32, KEYS=16, VALUES=16, num_warps=8, num_stages=1),
}
STEP = Tiles(
    "linear_attention.step",
    default=dict(VALUES=16, num_warps=4),
    interpreter=dict(VALUES=16),
    space=dict(VALUES=(8, 16, 32, 64), num_warps=(1, 2, 4, 8)),
)
COMBINE = Tiles(
    "linear_attention.combine",
    default=dict(BLOCK=512, num_warps=4),
    interpreter=dict(BLOCK=16),
    space=dict(BLOCK=(256, 512, 1024), num_warps=(2, 4, 8)),
)
