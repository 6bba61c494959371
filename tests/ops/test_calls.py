"""How ops are called: backends, mistakes, empty and non-contiguous inputs, memory, and what tracing needs of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longstate import ops
from longstate.ops.block_scan import chunked as block_chunked
from longstate.ops.delta_rule import chunked as delta_chunked
from longstate.ops.linear_attention import chunked as linear_chunked
from longstate.ops.scan import chunked as scan_chunked
from longstate.ops.selective_scan import chunked as selective_chunked
from longstate.ops.state_space import chunked as space_chunked
from ops.test_against_reference import CASES, IDS, largest_error, run

NAMES = {"scan", "selective_scan", "linear_attention", "short_convolution", "long_convolution"}
NAMES |= {
    "block_scan",
    "cauchy",
    "delta_rule",
    "dplr_scan",
    "liquid",
    "matrix_scan",
    "rms_norm",
    "state_space",
    "vandermonde",
}


def test_backends_say_what_is_in_use_and_why_not() -> None:
    found = ops.backends()
    assert set(found) == NAMES | {"linear"}
    for what in found.values():
        assert what["reference"] in ("on request", "in use")
        assert list(what.values()).count("in use") == 1
        assert all(w in ("in use", "on request") or w.startswith("not available: ") for w in what.values())


@pytest.mark.parametrize(("make", "kind"), CASES[::3], ids=IDS[::3])
def test_unknown_and_absent_backends(make: Callable[..., Any], kind: str) -> None:
    function, arguments = make(kind, 1, 4, torch.float64)
    with pytest.raises(ValueError, match="Did you mean 'chunked'"):
        function(**arguments, backend="chunkd")
    with pytest.raises(ValueError, match="reference"):
        function(**arguments, backend="refrence")
    absent = [name for name, what in ops.backends()["scan"].items() if what.startswith("not available")]
    for name in absent if function is ops.scan else ():
        with pytest.raises(ValueError, match="not available"):
            function(**arguments, backend=name)


@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_inputs_that_are_not_contiguous(make: Callable[..., Any], kind: str) -> None:
    function, arguments = make(kind, 2, 70, torch.float64)

    def strided(x: Any) -> Any:
        return x.mT.contiguous().mT if isinstance(x, torch.Tensor) and x.ndim > 1 else x

    wanted = run(function, arguments)
    y, final = function(**{name: strided(x) for name, x in arguments.items()})
    assert largest_error([y, final], wanted[:2]) < 1e-12


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_shapes_that_do_not_go_together(make: Callable[..., Any], kind: str) -> None:
    function, arguments = make(kind, 2, 6, torch.float64)
    first = next(iter(arguments))
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and name != first and x.ndim:
            wrong = torch.cat([x, x[:1]])
            with pytest.raises(ValueError, match="shape"):
                function(**(arguments | {name: wrong}))
    with pytest.raises(ValueError, match=r"Timeline\(start"):
        function(**arguments, start=torch.zeros(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("function", [ops.linear_attention, ops.delta_rule])
def test_groups_that_heads_cannot_share(function: Callable[..., Any]) -> None:
    q, v, beta = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 3, 6), torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match=rf"{function.__name__}: 3 heads of v cannot share 2 groups .* divisor of 3"):
        function(q, q, v, beta)


def test_rules_and_activations_that_do_not_exist() -> None:
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="zoh"):
        ops.selective_scan(x, x, torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), discretization="zohh")
    with pytest.raises(ValueError, match="silu"):
        ops.convolution.short(x, torch.zeros(3, 2), activation="selu")


class Watch(TorchDispatchMode):
    """Count calls and bytes: the largest result, and the most alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.largest = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                reference = StorageWeakRef(storage)
                self.alive[reference.cdata] = (reference, storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def watched(name: str, length: int) -> tuple[Watch, int, int]:
    """Run a chunked op forward and backward; return what was seen, the bytes of its inputs and of all states."""
    b, d, n = 2, 8, 16
    if name == "selective_scan":
        u, dt = torch.randn(b, length, d), torch.rand(b, length, d)
        A, B, C = -torch.rand(d, n), torch.randn(b, length, n), torch.randn(b, length, n)
        keep = [True] if "keep" in inspect.signature(selective_chunked.selective_scan).parameters else []
        given, states = (u, dt, A, B, C, torch.zeros(b, d, n)), b * length * d * n * 4
        with Watch() as watch:
            y, final, kept = selective_chunked.selective_scan(*given, None, "zoh", *keep)
            selective_chunked.selective_scan_backward(y, final, *given[:5], None, kept, "zoh")
    elif name == "state_space":
        u, A = torch.randn(b, length, d), torch.rand(d, n, n) / n
        powers = space_chunked.powers(A, torch.randn(d, n), torch.randn(d, n), space_chunked.CHUNK)[:4]
        given, states = (u, *powers, torch.zeros(b, d, n)), b * length * d * n * 4
        with Watch() as watch:
            y, kept = space_chunked.state_space(*given, None)
            space_chunked.state_space_backward(y, kept, u, *powers, None, kept)
    elif name == "scan":
        given = (torch.rand(b, length, d), torch.randn(b, length, d), torch.zeros(b, d))
        states = b * length * d * 4 * n
        with Watch() as watch:
            scan_chunked.scan(*given)
    elif name == "block_scan":
        given = (torch.rand(b, length, d, 2, 2), torch.randn(b, length, d, 2, 1), torch.zeros(b, d, 2, 1))
        states = b * length * d * 2 * 4 * n
        with Watch() as watch:
            block_chunked.block_scan(*given)
    else:
        q, k, v = torch.randn(b, length, 2, n), torch.randn(b, length, 2, n), torch.randn(b, length, 2, n)
        g = -torch.rand((b, length, 2, n) if name.endswith("channel") else (b, length, 2))
        keep = [True] if "keep" in inspect.signature(linear_chunked.linear_attention).parameters else []
        given, states = (q, k, v, g, torch.zeros(b, 2, n, n)), b * length * 2 * n * n * 4
        with Watch() as watch:
            if "delta" in name:
                beta = torch.rand(b, length, 2)
                y, final, kept = delta_chunked.delta_rule(*given[:3], beta, *given[3:], None, True)
                delta_chunked.delta_rule_backward(y, final, *given[:3], beta, g, None, kept)
            else:
                linear_chunked.linear_attention(*given, None, *keep)
    return watch, sum(x.nbytes for x in given), states


ATTENTIONS = ("linear_attention", "linear_attention channel", "delta_rule", "delta_rule channel")


@pytest.mark.parametrize("name", ["scan", "block_scan", "selective_scan", "state_space", *ATTENTIONS])
def test_memory_is_linear_and_no_tensor_holds_every_state(name: str) -> None:
    (short, _, _), (long, given, states) = watched(name, 2048), watched(name, 4096)
    assert long.peak <= 2.1 * short.peak
    assert long.largest < states / 4, "a tensor as large as all states"
    assert long.peak < 8 * given + 2**23


@pytest.mark.parametrize(
    ("name", "steps", "calls"),
    [
        ("scan", 1024, 40),
        ("state_space", 1024, 80),
        ("block_scan", 1024, 60),
        ("selective_scan", 32, 500),
        ("linear_attention", 512, 300),
        ("delta_rule", 64, 150),
    ],
)
def test_no_loop_over_time(name: str, steps: int, calls: int) -> None:
    """So many further steps (a chunk both ways; for the scan, one more halving) cost at most so many calls."""
    few, many = watched(name, 1024)[0].calls, watched(name, 2048)[0].calls
    assert (many - few) * steps <= 1024 * calls


def test_the_watch_sees_a_loop_and_a_large_tensor() -> None:
    with Watch() as watch:
        kept = [torch.zeros(10) for _ in range(50)]
        torch.zeros(1000)
    assert watch.calls >= 50 and watch.largest == 4000 and watch.peak >= 50 * 40 and kept


def registered() -> dict[str, dict[str, Any]]:
    """Return arguments for each op of the library, by the names of its schema."""

    def t(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)

    start = torch.rand(2, 5) < 0.3
    u, dt, A, B, C, h = (
        t(2, 5, 3),
        torch.rand(2, 5, 3).double(),
        -torch.rand(3, 4).double(),
        t(2, 5, 4),
        t(2, 5, 4),
        t(2, 3, 4),
    )
    q, k, v, g, S = t(2, 5, 2, 3), t(2, 5, 2, 3), t(2, 5, 4, 3), -torch.rand(2, 5, 4).double(), t(2, 4, 3, 3)
    segment = start.cumsum(1)
    one = dict(start=start, valid=~start, discretization="zoh", keep=True, backend="chunked", segment=segment)
    return {
        "scan": dict(a=torch.rand(2, 5, 3).double().requires_grad_(), b=t(2, 5, 3), initial=t(2, 3)) | one,
        "block_scan": dict(a=t(2, 5, 3, 2, 2), b=t(2, 5, 3, 2, 4), initial=t(2, 3, 2, 4)) | one,
        "selective_scan": dict(u=u, dt=dt.requires_grad_(), A=A.requires_grad_(), B=B, C=C, initial=h) | one,
        "linear_attention": dict(q=q, k=k, v=v, log_decay=g.requires_grad_(), initial=S) | one,
        "delta_rule": dict(q=q, k=k, v=v, beta=t(2, 5, 4), log_decay=g.requires_grad_(), initial=S) | one,
        "state_space": dict(u=u, taps=t(3, 2), write=t(3, 2, 4), read=t(3, 2, 4), through=t(3, 4, 4), initial=h) | one,
        "dplr_scan": dict(u=u, dt=dt, poles=A, P=t(3, 4, 2), Q=t(3, 4, 2), B=t(3, 4), C=t(3, 4), initial=h, alpha=0.7)
        | one,
        "liquid": dict(u=t(2, 5, 3), recurrent=t(3, 3), rate=torch.rand(3).double().requires_grad_(), target=t(3))
        | dict(dt=torch.rand(2, 5).double().requires_grad_(), initial=t(2, 3), steps=2)
        | one,
        "short_convolution": dict(padded=t(2, 5, 3), taps=t(3, 2)) | one,
        "long_convolution": dict(padded=t(2, 75, 3), taps=t(3, 70)) | one | dict(segment=None),
        "matrix_scan": dict(A=t(3, 3), b=t(2, 5, 3), initial=t(2, 3)) | one,
        "vandermonde": dict(weights=t(3, 4), log_base=t(3, 4), length=9) | one,
        "cauchy": dict(a=t(4, 3, 4), b=t(4, 3, 4), real=t(3, 4), imaginary=t(3, 4), single=False)
        | dict(nodes=torch.randn(9, dtype=torch.complex128))
        | one,
    }


@pytest.mark.compiled
@pytest.mark.parametrize("name", sorted(NAMES - {"rms_norm"}))  # what is portable of it is no node of its own
def test_registered_ops_by_opcheck(name: str) -> None:
    op, given = getattr(torch.ops.longstate, name).default, registered()[name]
    torch.library.opcheck(op, tuple(given[argument.name] for argument in op._schema.arguments))


@pytest.mark.compiled
@pytest.mark.parametrize(("make", "kind"), CASES[::2], ids=IDS[::2])
def test_ops_compile_and_export(make: Callable[..., Any], kind: str) -> None:
    function, arguments = make(kind, 2, 70, torch.float64)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    others = {name: x for name, x in arguments.items() if not isinstance(x, torch.Tensor)}

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, torch.Tensor]) -> Any:
            return function(**tensors, **others)

    torch._dynamo.reset()
    wanted = function(**arguments)
    got = torch.compile(Module(), fullgraph=True, backend="aot_eager")(tensors)
    assert largest_error(list(got), list(wanted)) < 1e-12
    exported = torch.export.export(Module(), (tensors,)).module()(tensors)
    assert largest_error(list(exported), list(wanted)) < 1e-12


@pytest.mark.compiled
def test_another_process_runs_an_exported_program(tmp_path: Path) -> None:
    """It knows ops by their names only, which `import longstate` must have registered; a gradient's node is made when
    it is first asked for, there and not before."""

    class Module(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return ops.scan(a, b)[0]

    a, b = torch.rand(1, 5, 3).requires_grad_(), torch.randn(1, 5, 3)
    (gradient,) = torch.autograd.grad(ops.scan(a, b)[0].sum(), a)
    torch.export.save(torch.export.export(Module(), (a, b)), tmp_path / "scan.pt2")
    code = f"""
import torch, longstate
a, b = torch.tensor({a.tolist()}).requires_grad_(), torch.tensor({b.tolist()})
module = torch.export.load({str(tmp_path / "scan.pt2")!r}).module()
print(torch.autograd.grad(module(a, b).sum(), a)[0].tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(gradient.tolist())
