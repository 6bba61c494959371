"""The GPU kernels of the delta rule, compiled for a GPU that is not there: nothing but registers holds a tile."""

from __future__ import annotations

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
    beta = torch.rand(batch, length, heads)
    decay = -torch.rand((batch, length, heads) if kind == "step" else q.shape)
    with compiling() as found:
        triton.delta_rule(q, k, v, decay, None, beta, None, 0)
        triton.delta_rule(*(x[:, :1] for x in (q, k, v, decay)), torch.zeros(1, 2, 128, 128), beta[:, :1], None, 0)
        triton.delta_rule_backward(v, None, q, k, v, decay, beta, None, torch.zeros(2, 1, 2, 128, 128), 128)
    assert {b.name for b in found} >= {"prepare", "forward", "outputs", "step", "backward", "squares", "rows_of"}
    for binary in found:
        # That of the gradients of decaying channels keeps a few numbers of each thread in the cache.
        room = 320 if binary.name == "rows_of" and kind == "channel" else 0
        stack = int(resources(binary).split("STACK:")[1].split()[0])
        assert stack <= room and binary.shared <= 227 * 1024, (binary.name, resources(binary), binary.shared)
