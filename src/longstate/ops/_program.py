"""One token of each of a few sequences through several kernels, in one call.

What a program computes is what the ops compute: the same kernels run in the same order. Only the time between them is
saved, which is longer than they take themselves where weights are few or narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from .. import native
from .._shapes import Float, Tensor
from .linear.cpu import KINDS
from .linear.cpu import ROWS as ROWS
from .linear_attention.cpu import TILE as STEPS
from .norm.cpu import rounds
from .selective_scan.cpu import TILE

TYPES = (torch.float32, torch.bfloat16)
_NONE = (0, 0, 0, False)
_LINE = 64  # bytes of a line of the cache


class Unfit(Exception):
    """What was to be added to a program is nothing that its kernels compute."""


class Place(NamedTuple):
    """Where rows ``[b 1 d]`` will be: so many bytes behind one of the addresses that a run is given."""

    address: int
    offset: int
    width: int
    apart: int
    dtype: torch.dtype

    def split(self, widths: Sequence[int]) -> list[Place]:
        """Return the columns in parts of these widths."""
        size, ends = self.dtype.itemsize, accumulate(widths)
        return [
            self._replace(offset=self.offset + (end - width) * size, width=width)
            for end, width in zip(ends, widths, strict=True)
        ]

    @property
    def rows(self) -> tuple[Any, ...]:
        """Return how a kernel finds them."""
        return (self.address, self.offset), self.apart, self.apart, self.dtype is torch.bfloat16


class Carried(NamedTuple):
    """A state: which addresses it comes from and goes to, and its type."""

    before: int
    after: int
    dtype: torch.dtype


class Product(NamedTuple):
    """What a linear layer multiplies with: weights ``[o i]``, and of int8 ones scales ``[o groups]``."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


def there() -> bool:
    """Return whether there are kernels."""
    return native.kernels is not None


def run(threads: int, *arguments: Any) -> None:
    """Run compiled programs one after the other, each followed by the addresses that it asks for."""
    assert native.kernels is not None
    native.kernels.run(threads, *arguments)


class Program:
    """Kernels to run one after the other, from the places that those before them wrote to.

    Args:
        batch: Sequences.
    """

    def __init__(self, batch: int) -> None:
        self.batch, self.threads = batch, native.threads()
        self._addresses, self._room = 1, 0
        self._calls: list[tuple[str, tuple[Any, ...]]] = []

    def given(self, width: int, dtype: torch.dtype) -> Place:
        """Return the place of rows whose address a run is given, next after those asked for before."""
        self._addresses += 1
        return Place(self._addresses - 1, 0, width, width, dtype)

    def carried(self, dtype: torch.dtype) -> Carried:
        """Return the places of a state before and after, whose two addresses a run is given next."""
        self._addresses += 2
        return Carried(self._addresses - 2, self._addresses - 1, dtype)

    def finish(self) -> Any:
        """Return the compiled program: its ``run`` takes addresses."""
        assert native.kernels is not None
        program = native.kernels.Program(self._room)
        for name, numbers in self._calls:
            program.add(name, *numbers)
        return program

    def linear(self, x: Place, product: Product, dtype: torch.dtype | None = None) -> Place:
        """Add ``ops.linear``."""
        weight, bias, scale = product
        outputs, inputs = weight.shape
        floats = [y for y in (bias, scale) if y is not None]
        self._expect(
            x.width == inputs,
            bias is None or bias.shape == (outputs,),
            weight.dtype is (x.dtype if scale is None else torch.int8),
            bias is None or dtype is not None or bias.dtype is x.dtype,
            *(y.is_contiguous() for y in (weight, *floats)),
            *(y.dtype in TYPES for y in floats),
        )
        y = self._place(outputs, dtype or x.dtype)
        groups = 1 if scale is None else scale.shape[1]
        scales = _NONE if scale is None else (scale.data_ptr(), 0, groups, scale.dtype is torch.bfloat16)
        sizes = (self.batch, 1, inputs, outputs, self.threads, KINDS[weight.dtype], inputs // groups)
        self._add("linear", *sizes, *x.rows, weight.data_ptr(), inputs, *scales, *native.vector(bias), *y.rows)
        return y

    def rms_norm(
        self,
        x: Place,
        weight: Float[Tensor, " d"] | None,
        gate: Place | None = None,
        *,
        eps: float,
        groups: int,
        offset: float,
        norm_before_gate: bool,
        last: bool = False,
    ) -> Place:
        """Add ``ops.rms_norm``; if it is the last, a run is given the address of its result."""
        fits = weight is None or (weight.dtype in TYPES and weight.is_contiguous() and weight.shape == (x.width,))
        self._expect(fits)
        y = (self.given if last else self._place)(x.width, x.dtype if weight is None else weight.dtype)
        rounded = rounds(weight, gate is not None and norm_before_gate, offset)
        self._add(
            "rms_norm",
            *(self.batch, 1, x.width, groups, not norm_before_gate, rounded, self.threads, float(eps), float(offset)),
            *(*x.rows, *native.vector(weight), *(_NONE if gate is None else gate.rows), *y.rows),
        )
        return y

    def short_convolution(
        self,
        u: Place,
        weight: Float[Tensor, "d k"],
        bias: Float[Tensor, " d"] | None,
        window: Carried,
    ) -> Place:
        """Add ``ops.convolution.short`` with SiLU; its window is ``[b k−1 d]``."""
        assert native.kernels is not None
        width, taps = weight.shape
        kinds = {u.dtype, window.dtype, weight.dtype, u.dtype if bias is None else bias.dtype}
        contiguous = weight.is_contiguous() and (bias is None or bias.is_contiguous())
        self._expect(width == u.width, bias is None or bias.shape == (width,))
        self._expect(kinds == {u.dtype}, contiguous, taps <= native.kernels.MOST_TAPS)
        y = self._place(width, u.dtype)
        rows = ((taps - 1) * width, width, u.dtype is torch.bfloat16)
        self._add(
            "short_convolution",
            *(self.batch, 1, width, taps, True, self.threads, *u.rows, *native.matrix(weight), *native.vector(bias)),
            *((window.before, 0), *rows, 0, 0, *y.rows, (window.after, 0), *rows),
        )
        return y

    def selective_scan(
        self,
        u: Place,
        dt: Place,
        dt_bias: Float[Tensor, " d"] | None,
        A_log: Float[Tensor, "d n"],
        B: Place,
        C: Place,
        D: Float[Tensor, " d"],
        gate: Place,
        state: Carried,
    ) -> Place:
        """Add ``ops.selective_scan`` with a gate, softplus and log A; its state is ``[b d n]``."""
        kept = [x for x in (dt_bias, A_log, D) if x is not None]
        self._expect(*(x.dtype in TYPES and x.is_contiguous() for x in kept), state.dtype is torch.float32)
        width, states = A_log.shape
        self._expect(*(x.width == width for x in (u, dt, gate)), *(x.shape == (width,) for x in kept if x is not A_log))
        self._expect(B.width == C.width == states)
        y = self._place(width, u.dtype)
        self._add(
            "selective_scan",
            *(self.batch, 1, width, states, TILE, True, True, self.threads),
            *(
                *u.rows,
                *dt.rows,
                *gate.rows,
                *B.rows,
                *C.rows,
                *native.matrix(A_log),
                *native.vector(D),
                *native.vector(dt_bias),
            ),
            *((state.before, 0), 0, 0, *y.rows, (state.after, 0), 0),
        )
        return y

    def head_steps(
        self,
        x: Place,
        bias: Float[Tensor, " h"],
        A_log: Float[Tensor, " h"],
        limit: tuple[float, float],
    ) -> tuple[Place, Place]:
        """Add Δ = clamp(softplus(x + bias)) and the log decay −Δ e^{A_log} of each head."""
        self._expect(*(y.dtype in TYPES and y.is_contiguous() and y.shape == (x.width,) for y in (bias, A_log)))
        step, decay = (self._place(x.width, torch.float32) for _ in range(2))
        given = (*x.rows, *native.vector(bias), *native.vector(A_log), *step.rows, *decay.rows)
        self._add("head_steps", self.batch, x.width, *map(float, limit), *given)
        return step, decay

    def linear_attention(
        self,
        q: Place,
        k: Place,
        v: Place,
        log_decay: Place,
        dt: Place,
        D: Float[Tensor, " d"],
        groups: int,
        state: Carried,
    ) -> Place:
        """Add ``ops.linear_attention`` with a decay and Δ for each head; its state is ``[b h k p]``."""
        self._expect(
            D.dtype in TYPES and D.is_contiguous(), len(D) in (dt.width, v.width), state.dtype is torch.float32
        )
        heads, y = dt.width, self._place(v.width, v.dtype)
        sizes = (self.batch, 1, groups, heads, q.width // groups, v.width // heads, 1, len(D) // heads, False, STEPS)
        rows = (*q.rows, *k.rows, *v.rows, *log_decay.rows, *dt.rows, *native.vector(D))
        self._add("linear_attention", *sizes, self.threads, *rows, (state.before, 0), 0, *y.rows, (state.after, 0), 0)
        return y

    def add(self, x: Place, z: Place, factor: float, y: Place) -> None:
        """Add y = x + factor z."""
        self._add("add", self.batch, x.width, float(factor), *x.rows, *z.rows, *y.rows)

    def _add(self, name: str, *numbers: Any) -> None:
        self._calls.append((name, numbers))

    def _expect(self, *fits: bool) -> None:
        if not all(fits):
            raise Unfit

    def _place(self, width: int, dtype: torch.dtype) -> Place:
        """Return room for rows between kernels."""
        place = Place(0, self._room, width, width, dtype)
        self._room += -(-self.batch * width * dtype.itemsize // _LINE) * _LINE
        return place
