"""To and from the systems of ``scipy.signal`` and of python-control."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._errors import check_choice
from .state_space import StateSpace


def to_scipy(system: StateSpace, form: str = "StateSpace") -> Any:
    """Return a ``scipy.signal`` system, an ``lti`` or with a step a ``dlti``.

    Args:
        system: The system.
        form: "StateSpace", "TransferFunction" (of one input) or "ZerosPolesGain" (of one input).

    Raises:
        ValueError: If there is no such form, or it has one input and the system several.
    """
    from scipy import signal  # here: SciPy is large, and a model needs none of it

    check_choice("to_scipy", "form", form, ("StateSpace", "TransferFunction", "ZerosPolesGain"))
    if form != "StateSpace" and system.B.shape[1] != 1:
        raise ValueError(
            f"to_scipy(form={form!r}): SciPy's have one input, not {system.B.shape[1]}. Take one column of B."
        )
    step = {} if system.dt is None else {"dt": system.dt}
    found = signal.StateSpace(system.A, system.B, system.C, system.feedthrough, **step)
    return {"StateSpace": found.to_ss, "TransferFunction": found.to_tf, "ZerosPolesGain": found.to_zpk}[form]()


def from_scipy(system: Any) -> StateSpace:
    """Return any ``lti`` or ``dlti`` of ``scipy.signal``; a step that SciPy leaves open is 1.

    Raises:
        ValueError: If it is none.
    """
    from scipy import signal  # here: SciPy is large, and a model needs none of it

    if not isinstance(system, signal.lti | signal.dlti):
        raise ValueError(
            f"from_scipy: wanted a scipy.signal.lti or dlti, not {type(system).__name__}. Make one, as"
            " scipy.signal.lti(numerator, denominator)."
        )
    found = system.to_ss()
    dt = None if isinstance(system, signal.lti) else 1.0 if found.dt is True else float(found.dt)
    A, B, C, D = (np.asarray(x) for x in (found.A, found.B, found.C, found.D))
    return StateSpace(A, B, C, D, dt)


def to_control(system: StateSpace) -> Any:
    """Return a ``control.StateSpace``.

    Raises:
        ValueError: If the system is complex, which python-control's are not.
        ImportError: If python-control is not installed.
    """
    control = _control()
    if any(np.iscomplexobj(x) for x in (system.A, system.B, system.C, system.feedthrough)):
        raise ValueError("to_control: python-control's systems are real. Take both modes of each pair, in real form.")
    return control.ss(system.A, system.B, system.C, system.feedthrough, 0 if system.dt is None else system.dt)


def from_control(system: Any) -> StateSpace:
    """Return a linear system of python-control; a step that it leaves open (``dt=True``) is 1.

    Raises:
        ValueError: If it is no linear system, or is neither continuous nor discrete (``dt=None``).
        ImportError: If python-control is not installed.
    """
    control = _control()
    if not isinstance(system, control.StateSpace | control.TransferFunction):
        raise ValueError(f"from_control: wanted a control.StateSpace or TransferFunction, not {type(system).__name__}")
    if system.dt is None:
        raise ValueError(
            "from_control(dt=None): the system is neither continuous nor discrete. Give it dt=0, or its step."
        )
    found = control.ss(system)
    dt = None if system.dt == 0 else 1.0 if system.dt is True else float(system.dt)
    A, B, C, D = (np.asarray(x) for x in (found.A, found.B, found.C, found.D))
    return StateSpace(A, B, C, D, dt)


def _control() -> Any:
    try:
        import control
    except ImportError as error:
        raise ImportError("python-control is not installed. Try: pip install 'longstate[control]'") from error
    return control
