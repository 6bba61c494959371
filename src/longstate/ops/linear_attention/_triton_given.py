"""What linear attention is given, as its kernels find it."""

from __future__ import annotations

import torch

from ..._shapes import Tensor
from .. import _triton
from .._triton import Tiles, cdiv, power_of_2
from . import _triton_by_channel, _triton_chunks, _triton_walk
from ._triton_tiles import BY_CHANNEL, STEP


class Given:
    """The arguments as the kernels find them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        dt: Tensor | None,
        D: Tensor | None,
        start: Tensor | None,
    ) -> None:
        self.batch, self.length, self.groups, self.keys = q.shape
        self.heads, self.values = v.shape[2:]
        self.shared = self.heads // self.groups
        self.state = (self.batch, self.heads, self.keys, self.values)
        self.by_channel, self.fixed = (log_decay is not None and log_decay.ndim == n for n in (4, 1))
        self.q, self.k, self.v = (_triton.rows(x) for x in (q, k, v))
        self.g, self.dt = log_decay, dt
        if log_decay is not None:
            self.g = log_decay.expand(v.shape[:3]) if self.fixed else log_decay
            self.g = _triton.rows(log_decay) if self.by_channel else self.g
        self.D = None if D is None else D.view(self.heads, -1).expand(self.heads, self.values)
        # The document that each step is of: starts are where neighbours differ.
        self.document = None if start is None else start.cumsum(1, dtype=torch.int32)
        types = {x.dtype for x in (q, k, v)}
        self.narrow = types == {torch.bfloat16}
        self.exact = torch.float32 in types

    @property
    def precision(self) -> str:
        """How the kernels multiply what is not bfloat16: float16 is exact in tf32, float32 errs by 2⁻¹⁰."""
        return "ieee" if self.exact else "tf32"

    def operands(self) -> torch.dtype:
        """Return the type of tiles that are read only to be multiplied."""
        return torch.bfloat16 if self.narrow else torch.float32

    def chunk(self, tiles: dict[bool, Tiles], keep: int) -> int:
        """Return the number of steps of a chunk, less where keys are wide; those between kept states hold whole pairs
        of chunks."""
        steps = tiles[self.exact](self.v, keys=self.keys, values=self.values)["CHUNK"]
        return min(steps, max(16, 64 * 128 // power_of_2(self.keys)), keep // 2 or steps)

    def strides(self, *names: str) -> tuple[int, ...]:
        """Return the distances of sequences, steps and heads of arguments; zeros for those that are absent."""
        tensors = (getattr(self, name) for name in names)
        return tuple(n for x in tensors for n in ((0, 0, 0) if x is None else x.stride()[:3]))

    def skips(self) -> tuple[int, ...]:
        """Return the distances of heads and values of D."""
        return (0, 0) if self.D is None else self.D.stride()

    def step(
        self,
        initial: Tensor | None,
        y: Tensor,
        final: Tensor,
        bias: Tensor | None = None,
        A_log: Tensor | None = None,
        limit: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Take the only step of a sequence; see ``token`` for the last three."""
        use = STEP(self.v, keys=self.keys, values=self.values)
        strides = [
            n
            for x in (self.v, self.q, self.k, self.g, self.dt)
            for n in ((0, 0) if x is None else (x.stride(0), x.stride(2)))
        ]
        _triton.launch(
            _triton_walk.step, (self.batch * self.heads * cdiv(self.values, use["VALUES"]),),
            self.v, self.q, self.k, self.g, self.dt, self.D, self.document, initial, y, final,
            *strides, self.skips()[0], bias, A_log, *limit, self.skips()[1], self.heads, self.shared, self.keys,
            self.values, CHANNELS=self.by_channel, KEYS=power_of_2(self.keys), **use,
        )  # fmt: skip

    def sums(self, chunk: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the running sums in chunks of decays per head in two parts; see ``_triton_chunks.running_sums``."""
        if self.g is None or self.by_channel:
            return None, None
        shape = (self.batch, self.heads, cdiv(self.length, chunk), chunk)
        high = self.v.new_empty(shape, dtype=torch.float32)
        low = None if self.narrow else torch.empty_like(high)
        _triton.launch(
            _triton_chunks.running_sums, (self.batch * self.heads * shape[2],),
            self.g, high, low, *self.strides("g"), self.length, self.heads, CHUNK=chunk, num_warps=1,
        )  # fmt: skip
        return high, low

    def prepared(self, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return scores, queries and keys with their factors, and what is left of states, where decays are per
        channel; see ``_triton_by_channel.prepare``."""
        if not self.by_channel:
            return None
        shape, chunks = (self.batch, self.length, self.heads, self.keys), cdiv(self.length, chunk)
        scores = self.v.new_empty(
            (self.batch, self.heads, self.length, chunk),
            dtype=torch.bfloat16 if self.v.dtype is torch.bfloat16 else torch.float32,
        )
        q_into, k_out = (  # with factors that would be lost in float16
            x.new_empty(shape, dtype=torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32)
            for x in (self.q, self.k)
        )
        through = self.v.new_empty((self.batch, self.heads, chunks, self.keys), dtype=torch.float32)
        use = BY_CHANNEL[self.exact](self.v, keys=self.keys, values=self.values)
        _triton.launch(
            _triton_by_channel.prepare, (self.batch * self.heads * chunks,),
            self.q, self.k, self.g, self.document, scores, q_into, k_out, through, *self.strides("q", "k", "g"),
            self.length, self.heads, self.shared, self.keys,
            CHUNK=chunk, SUB=sub(chunk), KEYS=min(use["KEYS"], power_of_2(self.keys, 16)),
            PRECISION=self.precision, num_warps=use["num_warps"], num_stages=use["num_stages"],
        )  # fmt: skip
        return scores, q_into, k_out, through


def sub(chunk: int) -> int:
    """Return the number of steps of a sub-block; under the interpreter, of which there are several too."""
    return min(16, chunk // 2) if _triton.interpreted else 16
