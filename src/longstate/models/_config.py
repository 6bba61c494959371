"""Models from configurations that came as data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .._errors import nearest
from .stack import check_kinds

Model = TypeVar("Model", bound=nn.Module)


def from_config(model: type[Model], config: Mapping[str, Any]) -> Model:
    """Build a model from its constructor's arguments as they were read from JSON.

    Raises:
        ValueError: If an entry is missing, unknown or of the wrong kind.
    """
    parameters = list(inspect.signature(model).parameters.values())
    known = [p.name for p in parameters]
    for name in config:
        if name not in known:
            raise ValueError(f"configuration: unknown entry {name!r}.{nearest(name, known)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in config:
            raise ValueError(f"configuration: {parameter.name} is missing")
    check_kinds("configuration", model.__init__, config)
    try:
        return model(**config)
    except (TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"configuration: an entry has the wrong kind of value ({str(error).splitlines()[0]})"
        ) from error
