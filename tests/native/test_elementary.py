"""The elementary functions of the compiled kernels, on every instruction set that runs here, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from longstate import native

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)
kernels = native.kernels


# Function, its number, where it is not flat, and the largest error in units of the last place.
FUNCTIONS = {
    "exp": (0, torch.exp, (-103.9, 88.7), 1.1),
    "log": (1, torch.log, (1e-37, 1e38), 1.0),
    "softplus": (2, lambda x: functional.softplus(x, threshold=700), (-103.0, 80.0), 2.0),
    "sigmoid": (3, torch.sigmoid, (-87.0, 80.0), 2.0),
    "silu": (4, functional.silu, (-87.9, 80.0), 3.0),
}
EXACT = [name for name in FUNCTIONS if name != "silu"]  # to the ends of float32's range


def apply(number: int, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    kernels.elementwise(number, x.data_ptr(), y.data_ptr(), len(x))
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_in_the_last_place(name: str, instructions: str) -> None:
    number, function, (low, high), most = FUNCTIONS[name]
    if low > 0:
        x = torch.cat([torch.linspace(np.log(low), np.log(high), 10**6).exp(), torch.linspace(0.5, 2, 10**5)])
    else:
        x = torch.cat([torch.linspace(low, high, 10**6), torch.linspace(-1, 1, 10**5), torch.tensor([0.0, 1e-30])])
    wanted = function(x.double())
    unit = np.spacing(np.abs(wanted.float().numpy())).astype(np.float64)
    errors = (apply(number, x).double() - wanted).abs().numpy() / unit
    assert errors.max() < most, f"{errors.max()} at {x[errors.argmax()]}"
    assert errors.max() > 0.4, "an error below rounding's is no error that was measured"


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 16, 21])
def test_special_values_and_any_count(name: str, count: int, instructions: str) -> None:
    number, function, _, _ = FUNCTIONS[name]
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1.0, -1.0, 89.0, -200.0])
    x = special.repeat(2)[:count]
    got, wanted = apply(number, x), function(x.double()).float()
    torch.testing.assert_close(got, wanted, rtol=4e-7, atol=1e-44, equal_nan=True)
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())


def test_silu_and_its_slope(instructions: str) -> None:
    """Both are 0 and 1 (or x) far out, where the numbers of the formula are infinite, and the slope has a root."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, 1e-40, -1e-40, 3e38, -3e38, 89.0, -89.0, -200.0])
    limit = torch.where(x.isnan(), x, torch.where(x > 80, x, torch.where(x < -80, 0, x / 2)))
    torch.testing.assert_close(apply(4, x), limit, rtol=4e-7, atol=1e-36, equal_nan=True)
    limit = torch.where(x.isnan(), x, torch.where(x > 80, 1.0, torch.where(x < -80, 0, 0.5)))
    torch.testing.assert_close(apply(5, x), limit, rtol=4e-7, atol=1e-36, equal_nan=True)
    x = torch.cat([torch.linspace(-100, 100, 10**6), torch.linspace(-2, 2, 10**6)])
    z = x.double()
    wanted = torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    assert (apply(5, x) - wanted).abs().max() < 5 * 2.0**-24


def test_an_instruction_set_that_there_is_none_of() -> None:
    before = native.instructions()
    assert not kernels.use("avx1024") and native.instructions() == before
