"""What every test has: run-time shape checks, one thread a worker, and a seed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("contract")  # before any test imports it


APART = ("compiled", "interpreted")


def checks_shapes(config: pytest.Config) -> bool:
    """Whether this run checks shapes and types at run time: all do but those of what needs a run of its own.

    The checks wrap every function of the package, and neither torch.compile nor Triton reads through the wrapping.
    """
    return config.option.markexpr.strip() not in APART


def pytest_configure(config: pytest.Config) -> None:
    """Wrap the package before anything imports it, and share the cores among the workers."""
    torch.set_num_threads(1)
    if config.option.markexpr.strip() == "interpreted":
        import interpreter

        interpreter.mend()
    if checks_shapes(config):
        from jaxtyping import install_import_hook

        # Something imported earlier (a plugin, say) would go unchecked without a word.
        assert "longstate" not in sys.modules, "longstate was imported before its import hook"
        config.add_cleanup(install_import_hook("longstate", "typechecking.check").uninstall)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot work beside the run-time checks, saying how to run it."""
    if checks_shapes(config):
        for item in items:
            for name in APART:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"needs a run of its own: pytest -m {name}"))


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Give every test the same random numbers, whichever tests ran before it in the same worker.

    The generator's state is put back, so that a test cannot lean on another's draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield 0


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernels of each instruction set that runs here, in turn."""
    from longstate import native  # here: not before the import hook

    if native.kernels is None:
        pytest.skip(native.reason)
    best = native.instructions()
    if not native.kernels.use(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    native.kernels.use(best)
