"""Shapes are checked at run time in this test suite, except where the compiler must see the code as it is."""

import pytest
import torch
from jaxtyping import TypeCheckError

from longstate.timeline import segments


def test_a_wrong_shape_is_caught() -> None:
    assert segments(torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1, 2]]
    with pytest.raises(TypeCheckError, match="segments"):
        segments(torch.ones(2, dtype=torch.bool))


@pytest.mark.compiled
def test_compiled_tests_run_without_the_checks() -> None:
    assert not hasattr(segments, "__wrapped__")
