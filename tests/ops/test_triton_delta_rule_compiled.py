"""The GPU kernels of the delta rule, compiled for a GPU that is not there: nothing but registers holds a tile."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from longstate.ops import _triton

pytestmark = pytest.mark.compiled

pytest.importorskip("triton")
if _triton.interpreted:
    pytest.skip("these are compiled", allow_module_level=True)


@pytest.mark.parametrize("kind", ["step", "channel"])
def test_compiles_without_spills(kind: str) -> None:
    from longstate.ops.delta_rule import triton
    from targets import compiling, resources

    batch, length, heads, width = 1, 128, 2, 128
    q, k, v = (torch.randn(batch, length, heads, width, dtype=torch.bfloat16) for _ in "qkv")
    beta, start = torch.rand(batch, length, heads), torch.zeros(batch, length, dtype=torch.bool)
    decay, state = (
        -torch.rand((batch, length, heads) if kind == "step" else q.shape),
        torch.zeros(2, 1, 2, width, width),
    )
    segments = 2 if kind == "step" else 1
    with compiling() as found, mock.patch.object(triton._triton_tiles, "segments", return_value=segments):
        triton.delta_rule(q, k, v, decay, None, beta, start, 0)
        triton.delta_rule(*(x[:, :1] for x in (q, k, v, decay)), state[0], beta[:, :1], None, 0)
        triton.delta_rule_backward(v, None, q, k, v, decay, beta, start, state, 128)
    names = {"prepare", "forward", "outputs", "step", "backward", "squares", "rows_of"}
    assert {b.name for b in found} == names | {"combine" if kind == "step" else "sums"}
    for binary in found:
        assert "STACK:0 " in resources(binary), (binary.name, resources(binary))
        assert binary.shared <= 227 * 1024, (binary.name, binary.shared)


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "stages", "room"),
    [
        # Alone: three stages. Two beside one another: two stages, or three where only one has room for two.
        (16, 128, torch.bfloat16, (3, 3), (132, 132)),
        (64, 128, torch.bfloat16, (2, 3), (264, 132)),
        (64, 64, torch.bfloat16, (3, 3), (264, 264)),
        (16, 256, torch.bfloat16, (2, 1), (132, 132)),
        (16, 128, torch.float32, (1, 1), (264, 264)),
    ],
    ids=str,
)
def test_what_there_is_memory_for(
    heads: int, width: int, dtype: torch.dtype, stages: tuple[int, ...], room: tuple[int, ...]
) -> None:
    from longstate.ops.delta_rule import triton
    from targets import compiling

    x = torch.empty(1, 64, heads, width, dtype=dtype)
    with compiling():
        chunks = triton._Chunks(x, x, x, None, x[..., 0], None)
        found = [chunks.walk_tiles(walk, 1) for walk in (triton._triton_tiles.WALK, triton._triton_tiles.WALK_BACK)]
    assert tuple(tiles["num_stages"] for tiles, _, _ in found) == stages
    assert tuple(there for _, _, there in found) == room
