"""A program of ops on a GPU: few kernels, in which norms, convolutions and sums are part of the products beside them.

What a captured step of a model runs. States change in place; between the kernels rows are tensors of their own. Where
there are more sequences than ``ROWS``, products are the library's, and what stands beside them is a kernel each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._shapes import Tensor
from ._program import ROWS, Call, Carried, Place, Program, Unfit
from .convolution._fused import MOST_TAPS
from .linear import linear


class _Source(NamedTuple):
    """Rows that are there whole, and from which of their columns on a place begins."""

    rows: Place
    column: int


class Launches:
    """A program as launches of Triton kernels.

    Args:
        program: The program.
        source: The place of the rows that a run is given.

    Raises:
        Unfit: If the kernels do not compute what is in it.
    """

    def __init__(self, program: Program, source: Place) -> None:
        self._batch, self._calls, self._source = program.batch, program.calls, source
        self._last, self._together = program.calls[-1].results[0], program.batch <= ROWS
        self._launches: list[Callable[[_Rows], None]] = []
        self._inside: dict[Place, _Source] = {}  # of a convolution's rows, those of the product that they are in
        states = (x for call in self._calls for x in call.given.values() if isinstance(x, Carried))
        self._states = sorted(set(states))
        for call in self._calls:
            getattr(self, f"_{call.name}")(call)

    def run(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Return the result for rows ``[b 1 d]``, and write the states after them where those before are."""
        rows = _Rows(self, dict(zip(self._states, states, strict=True)))
        rows.made[self._source] = x.reshape(self._batch, -1)
        for launch in self._launches:
            launch(rows)
        return rows.made[self._last][:, None]

    def source(self, x: Place) -> _Source:
        """Return where a place is."""
        whole = [self._source, *(y for call in self._calls for y in call.results)]
        for y in whole:
            first = x.offset - y.offset
            if x.address == y.address and 0 <= first < y.width * y.dtype.itemsize:
                column = first // y.dtype.itemsize
                rows, before = self._inside.get(y, _Source(y, 0))
                return _Source(rows, before + column)
        raise Unfit

    def _readers(self, y: Place) -> list[tuple[Call, str, Place]]:
        """Return who reads rows or some of their columns, and which."""
        found = ((call, name, x) for call in self._calls for name, x in call.given.items() if isinstance(x, Place))
        return [(call, name, x) for call, name, x in found if self.source(x).rows == self.source(y).rows]

    def _makes(self, x: Place, name: str) -> Call | None:
        """Return the op that makes just these rows, if it is such a one."""
        return next((call for call in self._calls if call.name == name and x in call.results), None)

    def _linear(self, call: Call) -> None:
        from .linear.triton import Norm, Taps, product

        (y,), given = call.results, call.given
        if not self._together:
            self._launches.append(lambda rows: rows.multiply(y, **given))
            return
        norm, taps, residual, factor = self._makes(given["x"], "rms_norm"), None, None, 1.0
        after, to = self._readers(y), y
        convolutions = [found for found, name, _ in after if name == "u" and found.name == "short_convolution"]
        if convolutions:
            taps, made = convolutions[0], convolutions[0].results[0]
            first = self.source(taps.given["u"]).column
            # Nobody else may want them as they were before.
            others = [(self.source(z).column, z.width) for found, name, z in after if found is not taps or name != "u"]
            if any(n < first + made.width and first < n + width for n, width in others):
                raise Unfit
            if taps.given["weight"].shape[1] > MOST_TAPS:
                raise Unfit
            self._inside[made] = _Source(y, first)
        elif len(after) == 1 and after[0][0].name == "add" and after[0][1] == "z":
            (to,), residual, factor = after[0][0].results, after[0][0].given["x"], after[0][0].given["factor"]

        def launch(rows: _Rows) -> None:
            before = behind = None
            if norm is None:
                x = rows(given["x"])
            else:
                x, *options = rows.norm(norm)
                before = Norm(*options)
            if taps is not None:
                window = rows.states[taps.given["window"]]
                behind = Taps(taps.given["weight"], taps.given["bias"], window, first)
            stream = None if residual is None else rows(residual)
            weights = (given["weight"], given["bias"], given["scale"])
            rows.made[to] = product(x, *weights, y.dtype, before, behind, stream, factor)

        self._launches.append(launch)

    def _rms_norm(self, call: Call) -> None:
        from .norm.triton import rms_norm

        (y,) = call.results
        if self._together and all(reader.name == "linear" and x == y for reader, _, x in self._readers(y)):
            return  # part of the products

        def launch(rows: _Rows) -> None:
            x, weight, gate, *options = rows.norm(call)
            rows.made[y] = rms_norm(x[:, None], weight, None if gate is None else gate[:, None], *options)[:, 0]

        self._launches.append(launch)

    def _short_convolution(self, call: Call) -> None:
        if not self._together and call.given["weight"].shape[1] <= MOST_TAPS:
            self._launches.append(lambda rows: rows.convolve(call.results[0], **call.given))
        elif call.results[0] not in self._inside:
            raise Unfit

    def _add(self, call: Call) -> None:
        if not self._together:
            self._launches.append(lambda rows: rows.add(call.results[0], **call.given))
            return
        made = self._makes(call.given["z"], "linear")
        if made is None or len(self._readers(made.results[0])) > 1:
            raise Unfit

    def _head_steps(self, call: Call) -> None:
        if any(reader.name != "linear_attention" for y in call.results for reader, _, _ in self._readers(y)):
            raise Unfit

    def _linear_attention(self, call: Call) -> None:
        from .linear_attention.triton import token

        (y,), given = call.results, call.given
        steps = self._makes(given["dt"], "head_steps")
        if steps is None or given["log_decay"] not in steps.results:
            raise Unfit

        def launch(rows: _Rows) -> None:
            q, k = (rows(given[name]).unflatten(1, (given["groups"], -1))[:, None] for name in ("q", "k"))
            dt = rows(steps.given["x"])
            v = rows(given["v"]).unflatten(1, (dt.shape[1], -1))[:, None]
            given_steps = (steps.given["bias"], steps.given["A_log"], steps.given["limit"])
            state = rows.states[given["state"]]
            rows.made[y] = token(q, k, v, dt[:, None], *given_steps, given["D"], state).flatten(1)

        self._launches.append(launch)

    def _selective_scan(self, call: Call) -> None:
        from .selective_scan.triton import selective_scan

        (y,), given = call.results, call.given

        def launch(rows: _Rows) -> None:
            u, dt, B, C, gate = (rows(given[name])[:, None] for name in ("u", "dt", "B", "C", "gate"))
            state, vectors = rows.states[given["state"]], (gate, given["dt_bias"])
            made, after, _ = selective_scan(
                u, dt, given["A_log"], B, C, given["D"], state, *vectors, None, None, True, True, 0
            )
            rows.made[y] = made[:, 0]
            _write(after, state)

        self._launches.append(launch)


def _write(after: Tensor, before: Tensor) -> None:
    """Write a state where the one before is, unless it is there already."""
    if after.data_ptr() != before.data_ptr():
        before.copy_(after)


class _Rows:
    """What the launches of one run have made so far."""

    def __init__(self, launches: Launches, states: dict[Carried, Tensor]) -> None:
        self._launches, self.states = launches, states
        self.made: dict[Place, Tensor] = {}

    def __call__(self, x: Place) -> Tensor:
        """Return the rows at a place ``[b d]``."""
        rows, column = self._launches.source(x)
        return self.made[rows][:, column : column + x.width]

    def multiply(self, y: Place, x: Place, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        """Compute ``ops.linear``."""
        self.made[y] = linear(self(x), weight, bias, scale, dtype=y.dtype)

    def convolve(self, y: Place, u: Place, weight: Tensor, bias: Tensor | None, window: Carried) -> None:
        """Compute ``ops.convolution.short`` with SiLU."""
        from .convolution.triton import short

        made, after = short(self(u)[:, None], weight, bias, self.states[window], None, None, True)
        self.made[y] = made[:, 0]
        _write(after, self.states[window])

    def add(self, y: Place, x: Place, z: Place, factor: float) -> None:
        """Compute y = x + factor z."""
        self.made[y] = torch.add(self(x), self(z), alpha=factor)

    def norm(self, call: Call) -> tuple[Any, ...]:
        """Return what a norm is given."""
        x, weight, gate, *options = call.given.values()
        return self(x), weight, None if gate is None else self(gate), *options
