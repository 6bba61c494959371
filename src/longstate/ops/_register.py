"""How an op becomes one node for autograd, torch.compile and torch.export, whatever backend computes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._library import autograd
from torch.autograd import forward_ad

from .. import native
from .._errors import nearest
from .._shapes import Tensor
from . import _triton

_LIBRARY = torch.library.Library("longstate", "DEF")
_LOGGER = logging.getLogger("longstate.ops")
_BACKENDS: dict[str, tuple[str, ...]] = {}
_CHOSEN: set[tuple[str, str]] = set()
_FORWARD: dict[str, dict[str, Callable[..., Any]]] = {}

# Why the compiled backends of the house are not there. A backend that exists is registered with its op instead.
_ABSENT = {
    "cpu": native.reason or "this op has no compiled kernel",
    "triton": _triton.reason or "this op has no Triton kernel",
}


def backends() -> dict[str, dict[str, str]]:
    """Return, for each op, what each backend is doing: "in use" (where it takes the arguments), "on request", or why it
    is not available."""
    return {
        op: {
            "reference": "on request" if set(names) - {"triton"} else "in use",
            **{name: _doing(name, names) for name in names},
            **{name: f"not available: {why}" for name, why in _ABSENT.items() if name not in names},
        }
        for op, names in _BACKENDS.items()
    }


def _doing(name: str, names: tuple[str, ...]) -> str:
    if name == "triton":
        return "in use on GPUs"
    return "in use" if name == next(x for x in names if x != "triton") else "on request"


def register(
    op: str,
    schema: str,
    *,
    forward: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    computes: str | None = None,
) -> None:
    """Register an op that takes its backend's name as the last argument.

    Args:
        op: Its name in ``torch.ops.longstate``.
        schema: Arguments (without the backend) and results, in the syntax of ``torch.library``.
        forward: The backends, the preferred one first.
        fake: Results without values, for tracing.
        setup_context: What to keep for the backward pass.
        backward: Gradients of the arguments.
        computes: The op that this one computes together with what stands around it: its backends are that op's, and
            preferred.
    """
    name = computes or op
    _BACKENDS[name] = (*forward, *_BACKENDS.get(name, ()))
    define(op, schema, forward, fake)
    _differentiate(op, backward, setup_context)


def _differentiate(op: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register a backward pass as ``torch.library.register_autograd`` does, but make what it registers when the op is
    first used: that takes a millisecond and a hundred objects an op, and most programs use few of them."""
    made: list[Callable[..., Any]] = []

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if not made:
            node = getattr(torch.ops.longstate, op).default
            made.append(autograd.make_autograd_impl(node, autograd.Info(backward, setup_context)))
        return made[0](keyset, *arguments)

    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


def define(op: str, schema: str, forward: dict[str, Callable[..., Any]], fake: Callable[..., Any]) -> None:
    """Define an op without gradient, such as the backward pass of another."""
    arguments, results = schema.split(" -> ")
    _LIBRARY.define(f"{op}({arguments}, str backend) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    _FORWARD[op] = forward

    def call(*values: Any) -> Any:
        *arguments, backend = values
        return _each(Tensor.contiguous, forward[backend](*arguments))

    def call_fake(*values: Any) -> Any:
        return _each(lambda x: x.new_empty(x.shape), fake(*values[:-1]))

    _LIBRARY.impl(op, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longstate::{op}", call_fake, lib=_LIBRARY)


def list_backends(op: str, forward: Mapping[str, Callable[..., Any]]) -> None:
    """List the backends of an op that is no node of its own: it is made of torch's, or runs where nobody sees it."""
    _BACKENDS[op] = tuple(forward)


def call(op: str, *arguments: Any, backend: str) -> Any:
    """Run an op as a node of its own; or without one, which takes half the time of a short call, where nothing would
    see the node: no gradient is wanted and no trace is taken."""
    if unobserved(*[x for x in arguments if isinstance(x, torch.Tensor)]):
        return _FORWARD[op][backend](*arguments)
    return getattr(torch.ops.longstate, op)(*arguments, backend)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def unobserved(*tensors: Tensor) -> bool:
    """Return whether a function may compute with these tensors' memory behind torch's back."""
    if torch.is_grad_enabled():
        for x in tensors:  # loops, since this is asked many times for each token: all(…) takes half as long again
            if x.requires_grad:
                return False
    return untraced(*tensors)


def untraced(*tensors: Tensor) -> bool:
    """Return whether nothing but autograd sees what is done with these tensors."""
    for x in tensors:
        if type(x) not in _PLAIN:
            return False
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _each(function: Callable[[Tensor], Tensor], results: Any) -> Any:
    """Compiled graphs rely on the strides that the fake promised: results are contiguous, always."""
    return function(results) if isinstance(results, Tensor) else tuple(function(x) for x in results)


def with_kernel(
    kernel: Callable[..., Any], portable: Callable[..., Any] | None = None, triton: str = ""
) -> dict[str, Callable[..., Any]]:
    """Return the backends of an op: its compiled kernel, if there are any; that of its folder's ``triton.py`` (written
    "folder.function"), if such can run; and a portable form that takes the same."""
    backends = {} if native.kernels is None else {"cpu": kernel}
    if triton:
        backends |= _triton.backend(*triton.split("."))
    return backends if portable is None else {**backends, "chunked": portable}


def choose(op: str, backend: str | None, refusals: Mapping[str, str] | None = None) -> str:
    """Return the backend to run: the preferred one of those that take the arguments, or the one asked for by name; the
    reference where there is no other.

    Args:
        op: The op.
        backend: The name asked for, if any.
        refusals: Why backends do not take the arguments; "" where they do.

    Raises:
        ValueError: If the one asked for does not exist, is not available or does not take the arguments.
    """
    names, best = _BACKENDS[op], "reference"
    for name in names:
        if not (refusals and refusals.get(name)):
            best = name
            break
    if backend is None:
        if (op, best) not in _CHOSEN and not torch.compiler.is_compiling():
            _CHOSEN.add((op, best))
            _LOGGER.info("%s: backend %s", op, best)
        return best
    if backend in names and refusals and refusals.get(backend):
        raise ValueError(f"{op}(backend={backend!r}): {refusals[backend]}. Use {best!r}, or leave it out.")
    if backend in names or backend == "reference":
        return backend
    if backend in _ABSENT:
        raise ValueError(
            f"{op}(backend={backend!r}): not available: {_ABSENT[backend]}. Use {best!r}, or leave it out."
        )
    raise ValueError(f"{op}(backend={backend!r}): there is no such backend.{nearest(backend, ('reference', *names))}")


def expect(op: str, name: str, x: Tensor, *wanted: tuple[int, ...]) -> None:
    """Check a shape against the shapes allowed.

    Raises:
        ValueError: If it is none of them.
    """
    if not torch.compiler.is_compiling() and x.shape in wanted:  # quickly
        return
    # The number of axes first: a traced comparison of sizes would be a promise about them.
    if all(x.ndim != len(shape) or tuple(x.shape) != shape for shape in wanted):
        allowed = " or ".join(str(list(shape)) for shape in wanted)
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, wanted {allowed} to go with the other arguments")


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """Return the type in which states and decays are kept: that of the arguments together, float32 at least."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether a backward pass may follow, for which an op then keeps what it needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def twice(
    portable: Callable[[], Any], given: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return gradients of ``given`` that can be differentiated themselves, as those of a kernel cannot.

    Args:
        portable: Computes what the kernel does by operations of torch's.
        given: What it computes from.
        grads: Gradients of its results.
    """
    wanted = [x for x in given if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(portable(), wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in given)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast rounds no products of float32: states and powers are as exact as that."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def real_of(dtype: torch.dtype) -> torch.dtype:
    """Return the type of real and imaginary parts; ``dtype.to_real`` is not traced by torch.compile."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
