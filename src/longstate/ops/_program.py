"""One token of each of a few sequences through several ops, written down to be run in one call.

What a program computes is what the ops compute. Who runs it sees all of it at once: on the CPU (``_program_cpu``) the
time between kernels is saved, on GPUs (``_program_triton``) several ops become one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from .._shapes import Float, Tensor
from .linear.cpu import ROWS as ROWS

TYPES = (torch.float32, torch.bfloat16)
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


class Call(NamedTuple):
    """An op of a program: its name, what it is given, and where its results go."""

    name: str
    given: dict[str, Any]
    results: tuple[Place, ...]


class Program:
    """Ops to run one after the other, from the places that those before them wrote to.

    Args:
        batch: Sequences.

    Attributes:
        calls: The ops.
        room: Bytes for the rows between them.
    """

    def __init__(self, batch: int) -> None:
        self.batch, self.room = batch, 0
        self.calls: list[Call] = []
        self._addresses = 1

    def given(self, width: int, dtype: torch.dtype) -> Place:
        """Return the place of rows whose address a run is given, next after those asked for before."""
        self._addresses += 1
        return Place(self._addresses - 1, 0, width, width, dtype)

    def carried(self, dtype: torch.dtype) -> Carried:
        """Return the places of a state before and after, whose two addresses a run is given next."""
        self._addresses += 2
        return Carried(self._addresses - 2, self._addresses - 1, dtype)

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
        return self._add("linear", y, x=x, weight=weight, bias=bias, scale=scale)

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
        options = dict(eps=float(eps), groups=groups, offset=float(offset), norm_before_gate=norm_before_gate)
        return self._add("rms_norm", y, x=x, weight=weight, gate=gate, **options)

    def short_convolution(
        self,
        u: Place,
        weight: Float[Tensor, "d k"],
        bias: Float[Tensor, " d"] | None,
        window: Carried,
    ) -> Place:
        """Add ``ops.convolution.short`` with SiLU; its window is ``[b k−1 d]``."""
        width = len(weight)
        kinds = {u.dtype, window.dtype, weight.dtype, u.dtype if bias is None else bias.dtype}
        contiguous = weight.is_contiguous() and (bias is None or bias.is_contiguous())
        self._expect(width == u.width, bias is None or bias.shape == (width,), kinds == {u.dtype}, contiguous)
        y = self._place(width, u.dtype)
        return self._add("short_convolution", y, u=u, weight=weight, bias=bias, window=window)

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
        given = dict(u=u, dt=dt, dt_bias=dt_bias, A_log=A_log, B=B, C=C, D=D, gate=gate, state=state)
        return self._add("selective_scan", y, **given)

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
        self._add("head_steps", step, decay, x=x, bias=bias, A_log=A_log, limit=limit)
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
        y = self._place(v.width, v.dtype)
        given = dict(q=q, k=k, v=v, log_decay=log_decay, dt=dt, D=D, groups=groups, state=state)
        return self._add("linear_attention", y, **given)

    def add(self, x: Place, z: Place, factor: float, y: Place) -> None:
        """Add y = x + factor z."""
        self._add("add", y, x=x, z=z, factor=float(factor))

    def _add(self, name: str, *results: Place, **given: Any) -> Place:
        self.calls.append(Call(name, given, results))
        return results[0]

    def _expect(self, *fits: bool) -> None:
        if not all(fits):
            raise Unfit

    def _place(self, width: int, dtype: torch.dtype) -> Place:
        """Return room for rows between kernels."""
        place = Place(0, self.room, width, width, dtype)
        self.room += -(-self.batch * width * dtype.itemsize // _LINE) * _LINE
        return place
