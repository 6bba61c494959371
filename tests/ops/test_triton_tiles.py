"""Where GPU kernels run, in what tiles, what is said where they cannot, and how they are started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longstate import ops
from longstate.ops import _register, _triton

KNOWN = [
    {"sizes": {"t": 1024, "d": 64}, "use": {"TIME": 32}},
    {"sizes": {"t": 1024, "d": 1024}, "use": {"TIME": 64}},
    {"sizes": {"t": 16_384, "d": 1024}, "use": {"TIME": 128, "num_warps": 8}},
]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that says it is on a GPU, and holds nothing."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def tiles() -> Iterator[_triton.Tiles]:
    """Tiles of a kernel that the table knows, on the device that is there."""
    table = {"sm_90": {"of a test": KNOWN}}
    _triton._nearest.cache_clear()
    with (
        mock.patch.dict(_triton.Tiles.known),
        mock.patch.object(_triton, "table", return_value=table),
        mock.patch.object(_triton, "architecture", return_value="sm_90"),
    ):
        space = dict(TIME=[16, 32], num_warps=[2, 4, 8])
        yield _triton.Tiles("of a test", dict(TIME=16, num_warps=4), dict(TIME=2), space)
    _triton._nearest.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "time", "warps"),
    [
        (dict(t=1024, d=64), 32, 4),
        (dict(t=1000, d=200), 32, 4),  # by a factor of 3.1 from 64, of 5.1 from 1024
        (dict(t=1, d=4000), 64, 4),
        (dict(t=0, d=0), 32, 4),
        (dict(t=5000, d=1024), 128, 8),  # by a factor of 4.9 from 1024, of 3.3 from 16,384
        (dict(t=1 << 20, d=512), 128, 8),
        (dict(t=16_384), 128, 8),  # a size that is not told is no distance
        (dict(t=16_384, d=1024, n=7), 128, 8),  # nor is one that the table does not have
    ],
    ids=str,
)
def test_the_row_of_the_nearest_sizes(tiles: _triton.Tiles, sizes: dict[str, int], time: int, warps: int) -> None:
    assert tiles(on_gpu(1), **sizes) == dict(TIME=time, num_warps=warps)


def test_what_the_table_does_not_know(tiles: _triton.Tiles) -> None:
    for elsewhere in ({}, {"sm_80": {"of a test": KNOWN}}, {"sm_90": {"another": KNOWN}}):
        _triton._nearest.cache_clear()
        with mock.patch.object(_triton, "table", return_value=elsewhere):
            assert tiles(on_gpu(1), t=1024, d=64) == dict(TIME=16, num_warps=4)


def test_small_tiles_without_a_gpu(tiles: _triton.Tiles) -> None:
    assert tiles(torch.ones(1), t=1024, d=64) == dict(TIME=2, num_warps=4)


def test_what_is_returned_may_be_changed(tiles: _triton.Tiles) -> None:
    for x in (on_gpu(1), torch.ones(1)):
        before = tiles(x, t=1024, d=64)
        tiles(x, t=1024, d=64)["TIME"] = 7
        assert tiles(x, t=1024, d=64) == before


def test_forced_choices(tiles: _triton.Tiles) -> None:
    """They go before the table and the interpreter's, on the defaults, and end with their block, also by an error."""
    for x in (on_gpu(1), torch.ones(1)):
        before = tiles(x, t=1024, d=64)
        with tiles.force({"TIME": 256}):
            assert tiles(x, t=1024, d=64) == dict(TIME=256, num_warps=4)
            with tiles.force({"num_warps": 1}):
                assert tiles(x) == dict(TIME=16, num_warps=1)
            assert tiles(x) == dict(TIME=256, num_warps=4)
        with pytest.raises(KeyError), tiles.force({}):
            raise KeyError
        assert tiles(x, t=1024, d=64) == before


def test_the_table_that_is_there() -> None:
    """Every row is of a kernel's own names, and has sizes to be near to."""
    for kernels in _triton.table().values():
        for rows in kernels.values():
            assert all(row["sizes"] and min(row["sizes"].values()) > 0 and row["use"] for row in rows)


def test_why_kernels_do_not_take_something() -> None:
    one, half = on_gpu(1), on_gpu(1, dtype=torch.float16)
    with mock.patch.object(_triton, "reason", ""), mock.patch.object(_triton, "interpreted", False):
        assert _triton.refusal() == _triton.refusal(None, one, half) == ""
        for x in (torch.ones(1), on_gpu(1, dtype=torch.float64), on_gpu(1, dtype=torch.complex64)):
            assert _triton.refusal(one, None, x) == "its kernels take float32, bfloat16, float16, on a GPU"
        assert _triton.refusal(one, types=(torch.float64,)) == "its kernels take float64, on a GPU"
        assert _triton.refusal(on_gpu(1, dtype=torch.float64), types=(torch.float64,)) == ""
    with mock.patch.object(_triton, "reason", ""), mock.patch.object(_triton, "interpreted", True):
        assert _triton.refusal(torch.ones(1)) == ""
        assert "float32" in _triton.refusal(torch.ones(1).double())
    with mock.patch.object(_triton, "reason", "it rains"):
        assert _triton.refusal(one) == "it rains"


def test_why_no_kernel_runs() -> None:
    with mock.patch.object(_triton, "find_spec", return_value=None):
        assert _triton._missing() == "Triton is not installed"
    with (
        mock.patch.object(_triton, "find_spec", return_value=True),
        mock.patch.object(torch.version, "cuda", None),
        mock.patch.object(torch.version, "hip", None),
    ):
        with mock.patch.object(_triton, "interpreted", False):
            assert _triton._missing() == "this torch is built without GPUs"
        with mock.patch.object(_triton, "interpreted", True):
            assert _triton._missing() == ""
        with mock.patch.object(torch.version, "hip", "7.0"):
            assert _triton._missing() == ""
    with mock.patch.object(_triton, "reason", "it rains"):
        assert _triton.backend("norm", "rms_norm") == {}


def test_an_implementation_is_imported_when_it_is_called() -> None:
    with (
        mock.patch.object(_triton, "reason", ""),
        mock.patch.object(_triton, "import_module") as imported,
    ):
        (call,) = _triton.backend("norm", "rms_norm").values()
        assert not imported.called
        assert call(1, 2) is imported.return_value.rms_norm.return_value
    imported.assert_called_once_with("longstate.ops.norm.triton")
    imported.return_value.rms_norm.assert_called_once_with(1, 2)


def test_asking_for_kernels_that_cannot_run() -> None:
    """The message says why, and what there is instead."""
    backends = {"rms_norm": tuple(name for name in _register._BACKENDS["rms_norm"] if name != "triton")}
    absent = {"triton": "Triton is not installed"}
    with mock.patch.dict(_register._BACKENDS, backends), mock.patch.dict(_register._ABSENT, absent):
        with pytest.raises(ValueError, match=r"rms_norm\(backend='triton'\): not available: Triton is not installed"):
            ops.rms_norm(torch.ones(3), backend="triton")
        assert ops.backends()["rms_norm"]["triton"] == "not available: Triton is not installed"
    present = {"rms_norm": (*backends["rms_norm"], "triton")}
    with mock.patch.dict(_register._BACKENDS, present):
        with pytest.raises(
            ValueError, match=r"rms_norm\(backend='triton'\): it rains. Use 'reference', or leave it out"
        ):
            _register.choose("rms_norm", "triton", {"cpu": "no", "triton": "it rains"})
        assert _register.choose("rms_norm", "triton", {"triton": ""}) == "triton"
        assert _register.choose("rms_norm", None, {"cpu": "no", "triton": "it rains"}) == "reference"
        assert _register.choose("rms_norm", None, {"cpu": "no", "triton": ""}) == "triton"
        assert ops.backends()["rms_norm"]["triton"] == "in use on GPUs"


class Kernel:
    """Records what is started instead of starting it."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.started.append((grid, arguments, options))


def test_launch() -> None:
    kernel, x = Kernel(), torch.ones(2)
    for grid in ((0,), (3, 0), (0, 1, 2)):
        _triton.launch(kernel, grid, x, 5, SIZE=1)
    assert not kernel.started, "an empty grid starts nothing"
    _triton.launch(kernel, (3, 2), x, None, 5, SIZE=1)
    assert kernel.started == [((3, 2), (x, None, 5), {"SIZE": 1})]


def test_launch_on_another_device() -> None:
    """What is current becomes the tensor's for the start alone."""
    kernel, x = Kernel(), on_gpu(1)
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=1),
        mock.patch.object(torch.cuda, "device") as entered,
    ):
        _triton.launch(kernel, (1,), x)
    entered.assert_called_once_with(x.device)
    assert len(kernel.started) == 1
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "device") as entered,
    ):
        _triton.launch(kernel, (1,), x)
    assert not entered.called and len(kernel.started) == 2


def test_sizes() -> None:
    assert [_triton.cdiv(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [_triton.power_of_2(x) for x in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]
    assert [_triton.power_of_2(x, 16) for x in (0, 16, 17)] == [16, 16, 32]
