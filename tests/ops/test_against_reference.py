"""Every backend of every op computes what its reference computes: outputs, final states and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longstate import ops

LENGTHS = (0, 1, 5, 64, 65, 200)


def flags(kind: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random document starts and steps that do not count."""
    result = {}
    if "start" in kind:
        result["start"] = torch.rand(batch, length) < 0.05
        # One row begins anew in the last window of a convolution, or at its only step; the others may not.
        result["start"][-1, -2 : -1 if length > 1 else None] = True
    if "valid" in kind:
        result["valid"] = torch.rand(batch, length) < 0.8
    return result


def scan_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    c = dtype.to_complex() if "complex" in kind else dtype
    a = torch.rand(5, dtype=dtype) if "fixed" in kind else torch.rand(b, t, 5, dtype=dtype)
    if "complex" in kind:
        a = torch.polar(a, torch.randn_like(a))
    return ops.scan, dict(a=a, b=torch.randn(b, t, 5, dtype=c), initial=torch.randn(b, 5, dtype=c))


def block_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Matrices with one eigenvector only among others, none of which lets the state grow for long."""
    c = dtype.to_complex() if "complex" in kind else dtype
    size, columns = (3, 1) if "three" in kind else (2, 2)
    a = torch.randn(*(() if "fixed" in kind else (b, t)), 4, size, size, dtype=c)
    a = 0.9 * a / torch.linalg.matrix_norm(a, 2, keepdim=True)
    a[..., 0, :, :] = 0.5 * torch.eye(size, dtype=c) + 0.4 * torch.eye(size, dtype=c).roll(1, 0).tril()
    b_t, initial = (torch.randn(*s, 4, size, columns, dtype=c) for s in ((b, t), (b,)))
    return ops.block_scan, dict(a=a, b=b_t, initial=initial)


def selective_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    d, n = 3, 4
    A = -torch.rand(d, n, dtype=dtype) * 3
    c = dtype
    if "complex" in kind:
        A, c = torch.complex(A, torch.randn_like(A) * 3), dtype.to_complex()
    B, C = (torch.randn(d, n, dtype=c) if "fixed" in kind else torch.randn(b, t, n, dtype=c) for _ in "BC")
    rule = next((r for r in ("bilinear", "zoh-euler") if r in kind), "zoh")
    arguments = dict(u=torch.randn(b, t, d, dtype=dtype), dt=torch.rand(b, t, d, dtype=dtype), A=A, B=B, C=C)
    arguments |= dict(D=torch.randn(d, dtype=dtype), initial=torch.randn(b, d, n, dtype=c), discretization=rule)
    return ops.selective_scan, arguments


def linear_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    g, h, k, p = (2, 6, 5, 4) if "groups" in kind else (3, 3, 5, 4)
    decay = None
    for name, shape in {"head": (h,), "step": (b, t, h), "channel": (b, t, h, k)}.items():
        if name in kind:
            decay = -(torch.rand(shape, dtype=dtype) ** 4) * (40 if "strong" in kind else 1)
    q, key = (torch.randn(b, t, g, k, dtype=dtype) for _ in "qk")
    v, initial = torch.randn(b, t, h, p, dtype=dtype), torch.randn(b, h, k, p, dtype=dtype)
    return ops.linear_attention, dict(q=q, k=key, v=v, log_decay=decay, initial=initial)


def delta_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Keys of length 1 and write strengths up to 2: a state that may turn round but not grow."""
    _, arguments = linear_case(kind, b, t, dtype)
    arguments["k"] = torch.nn.functional.normalize(arguments["k"], dim=-1)
    arguments["beta"] = 2 * torch.rand(arguments["v"].shape[:3], dtype=dtype)
    return ops.delta_rule, arguments


def short_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    taps = 1 if "one" in kind else 4
    arguments = dict(u=torch.randn(b, t, 3, dtype=dtype), weight=torch.randn(3, taps, dtype=dtype))
    arguments |= dict(bias=torch.randn(3, dtype=dtype), initial=torch.randn(b, taps - 1, 3, dtype=dtype))
    return ops.convolution.short, arguments | dict(activation="silu")


def long_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    taps = 20 if "few" in kind else 150
    u, kernel = torch.randn(b, t, 3, dtype=dtype), torch.randn(3, taps, dtype=dtype)
    return ops.convolution.long, dict(u=u, kernel=kernel, initial=torch.randn(b, taps - 1, 3, dtype=dtype))


def state_space_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Matrices whose magnitudes shrink a state, too."""
    d, n = 3, 4
    A = torch.rand(1 if "shared" in kind else d, n, n, dtype=dtype) - 0.3
    A = 0.98 * A / A.abs().sum(-1, keepdim=True)
    u, B, C = (torch.randn(*shape, dtype=dtype) for shape in ((b, t, d), (d, n), (d, n)))
    return ops.state_space, dict(u=u, A=A, B=B, C=C, initial=torch.randn(b, d, n, dtype=dtype))


def matrix_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A rotation that shrinks a little, so that the state neither fades nor grows within the sequence."""
    A = 0.99 * torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0].to(dtype)
    return ops.matrix_scan, dict(A=A, b=torch.randn(b, t, 5, dtype=dtype), initial=torch.randn(b, 5, dtype=dtype))


def dplr_case(kind: str, b: int, t: int, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    d, n, r = 3, 4, 1 if "one" in kind else 2
    c = dtype.to_complex() if "complex" in kind else dtype
    poles, P = -0.2 - torch.rand(d, n, dtype=dtype).to(c), 0.5 * torch.randn(d, n, r, dtype=c)
    poles = poles + 1j * torch.randn(d, n, dtype=dtype) if c.is_complex else poles
    B, C, initial = (torch.randn(*shape, dtype=c) for shape in ((d, n), (d, n), (b, d, n)))
    u, dt = torch.randn(b, t, d, dtype=dtype), torch.rand(b, t, d, dtype=dtype)
    Q = P + 0.05 * torch.randn_like(P)
    arguments = dict(u=u, dt=dt, poles=poles, P=P, Q=Q, B=B, C=C, initial=initial)
    return ops.dplr_scan, arguments | ({"alpha": 0.7} if "implicit" in kind else {})


CASES = [
    *((scan_case, k) for k in ("fixed", "step", "fixed complex", "step complex")),
    *((block_case, k) for k in ("fixed", "step", "step complex three")),
    *(
        (selective_case, k)
        for k in ("zoh-euler", "zoh", "bilinear", "zoh complex fixed", "bilinear complex fixed", "zoh-euler complex")
    ),
    *(
        (linear_case, k)
        for k in ("none", "head", "step", "channel", "groups none", "groups step strong", "groups channel strong")
    ),
    *((delta_case, k) for k in ("none", "step", "channel", "groups step strong", "groups channel strong")),
    *((state_space_case, k) for k in ("", "shared")),
    *((dplr_case, k) for k in ("complex", "one implicit")),
    *((short_case, k) for k in ("", "one")),
    *((long_case, k) for k in ("", "few")),
    (matrix_case, ""),
]
IDS = [f"{make.__name__.removesuffix('_case')} {kind}".strip() for make, kind in CASES]


def run(function: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Return outputs, final state, and gradients of a random (but fixed) function of both."""
    arguments = {
        name: x.detach().clone().requires_grad_()
        if isinstance(x, torch.Tensor) and x.dtype.is_floating_point | x.dtype.is_complex
        else x
        for name, x in arguments.items()
    }
    y, final = function(**arguments, **options)
    generator = torch.Generator().manual_seed(0)
    # Numbers that every type holds: what comes in from behind is then the same for all.
    weights = (torch.randn(x.shape, generator=generator).bfloat16().double() for x in (y, final))
    total = sum(
        (x.abs() if x.is_complex() else x).double().mul(w).sum() for x, w in zip((y, final), weights, strict=True)
    )
    total = total + (y * y).real.sum() if y.is_complex() else total
    wanted = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return [y.detach(), final.detach(), *gradients]


def largest_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of each tensor; not-a-number if there is one."""
    errors = [0.0]
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        errors.append(((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).item() if x.numel() else 0.0)
    return torch.tensor(errors).max().item()  # Python's max would pass over it


@pytest.mark.parametrize(
    ("marks", "length"),
    # One mark alone at two lengths: at all lengths that takes as long again, and finds what both together do.
    [(marks, length) for marks in ("", "start valid") for length in LENGTHS]
    + [(marks, length) for marks in ("start", "valid") for length in (5, 65)],
)
@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_chunked_equals_reference(make: Callable[..., Any], kind: str, marks: str, length: int) -> None:
    function, arguments = make(kind, 2, length, torch.float64)
    options = flags(marks, 2, length)
    wanted = run(function, arguments, backend="reference", **options)
    assert largest_error(run(function, arguments, **options), wanted) < 1e-10


@pytest.mark.parametrize("marks", ["", "start", "valid", "start valid"])
@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_pieces_equal_the_whole(make: Callable[..., Any], kind: str, marks: str) -> None:
    """The reference shares what stands around an op, such as a convolution's window; this does not rely on it."""
    batch, length, cut = 2, 97, 40
    function, arguments = make(kind, batch, length, torch.float64)
    options = flags(marks, batch, length)
    if "start" in options:
        options["start"][0, cut - 2] = True  # the window at the cut holds two sequences
    whole, final = function(**arguments, **options)
    given = arguments | options
    timed = [name for name, x in given.items() if isinstance(x, torch.Tensor) and x.shape[:2] == (batch, length)]
    outputs, state = [], given["initial"]
    for at in (slice(0, cut), slice(cut, length)):
        y, state = function(**given | {name: given[name][:, at] for name in timed} | {"initial": state})
        outputs.append(y)
    assert largest_error([torch.cat(outputs, 1), state], [whole, final]) < 1e-10


@pytest.mark.parametrize("backend", ["reference", "chunked", None])
@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_steps_that_do_not_count_are_as_if_absent(make: Callable[..., Any], kind: str, backend: str | None) -> None:
    """Be they no numbers. The reference has its inputs from what all backends have them from; this does not rely on
    it."""
    batch, length = 2, 37
    function, arguments = make(kind, batch, length, torch.float64)
    valid = flags("valid", batch, length)["valid"]
    timed = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.shape[:2] == (batch, length)]
    poisoned = {
        n: arguments[n].masked_fill(~valid.view(*valid.shape, *[1] * (arguments[n].ndim - 2)), torch.nan) for n in timed
    }
    y, final = function(**arguments | poisoned, valid=valid, backend=backend)
    assert not y[~valid].any()
    for i in range(batch):
        alone = {name: arguments[name][i : i + 1, valid[i]] for name in timed}
        initial = arguments["initial"][i : i + 1]
        wanted = function(**arguments | alone | {"initial": initial}, backend=backend)
        assert largest_error([y[i : i + 1, valid[i]], final[i : i + 1]], list(wanted)) < 1e-10


@pytest.mark.parametrize("backend", ["reference", "chunked", None])
def test_what_stands_around_the_selective_scan(backend: str | None) -> None:
    """Step, decay, skip and gate, written out."""
    b, t, d, n = 2, 9, 3, 4
    u, dt, gate = (torch.randn(b, t, d, dtype=torch.float64) for _ in range(3))
    log_A, D, bias = (torch.randn(*s, dtype=torch.float64) for s in ((d, n), (d,), (d,)))
    B, C = (torch.randn(b, t, n, dtype=torch.float64) for _ in "BC")
    elapsed = torch.rand(b, t, dtype=torch.float64)
    step = torch.log(1 + torch.exp(dt + bias)) * elapsed[..., None]
    y, final = ops.selective_scan(u, step, -torch.exp(log_A), B, C)
    wanted = (y + D * u) * gate / (1 + torch.exp(-gate))
    options = dict(gate=gate, dt_bias=bias, dt_softplus=True, elapsed=elapsed, log_A=True)
    got = ops.selective_scan(u, dt, log_A, B, C, D, **options, backend=backend)
    torch.testing.assert_close(got, (wanted, final), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "groups step strong", "groups channel strong"])
def test_what_stands_around_linear_attention(kind: str) -> None:
    function, arguments = linear_case(kind, 2, 70, torch.float64)
    heads, values = arguments["v"].shape[2:]
    dt, options = torch.rand(2, 70, heads, dtype=torch.float64), flags("start valid", 2, 70)
    for D in (torch.randn(heads, dtype=torch.float64), torch.randn(heads, values, dtype=torch.float64)):
        y, final = function(**arguments, **options, dt=dt, D=D)
        inside = arguments | {"v": arguments["v"] * dt[..., None]}
        wanted, wanted_final = function(**inside, **options, backend="reference")
        wanted = wanted + (arguments["v"] * options["valid"][..., None, None]) * D.view(heads, -1)
        assert largest_error([y, final], [wanted, wanted_final]) < 1e-10
