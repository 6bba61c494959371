"""The delta rule on GPUs: chunks by themselves, a walk from chunk to chunk, and chunks by themselves again.

See ``chunked`` for what is computed. The system of a chunk is inverted (T = (I + B)⁻¹), so that the walk has two
products for each chunk, U = U₀ − W S and S ← through S + K_outᵀ U. Backwards, where X is the gradient of U, Wᵀ X is
what its state's gradient loses: that walk needs nothing that the walk forward has not.

Where there are too few sequences and heads to fill a GPU, time is cut into segments. The state after one is Φ S + E: E
comes of a walk from zero, Φ of one from the identity in which nothing is written; the gradient of the state before is
Φᵀ R and what a walk back from zero ends with. When these are combined, every segment is walked from its true state.

What goes into a product of matrices is in the type of q, k and v, if they have one, and in float32 else; sums, states
and decays are in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._shapes import Tensor
from .. import _triton
from . import _triton_chunks, _triton_gradients, _triton_tiles, _triton_walk


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    beta: Tensor,
    start: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t h p]``, the final state ``[b h k p]`` and those every ``keep`` steps ``[j+1 b h k p]``.

    The last are for the backward pass; none where ``keep`` is 0.
    """
    x = _Chunks(q, k, v, log_decay, beta, start)
    initial = None if initial is None else initial.to(torch.float32).contiguous()
    single = x.length == 1 and not keep
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = _triton.final_state(initial, (x.batch, x.heads, x.K, x.P), v, single)
    if single:
        x.step(initial, y, final)
        return y, final, final.new_empty(0)
    kept = final.new_empty(_triton.cdiv(x.length, keep) + 1, *final.shape) if keep else None
    parts = x.prepare(None)
    states = x.walk(parts, initial, kept, keep, final)
    x.outputs(parts, states, y)
    return y, final, final.new_empty(0) if kept is None else kept


def delta_rule_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    start: Tensor | None,
    kept: Tensor,
    keep: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, log_decay (empty if there is none), the initial state and β; and no more."""
    x = _Chunks(q, k, v, log_decay, beta, start)
    grad = _triton.rows(grad)
    parts = x.prepare(grad)
    states = x.walk_from(parts, kept.contiguous(), keep // x.C, None, keep, None)
    laters, grad_initial = x.walk_back(parts, grad, None if grad_final is None else grad_final.float().contiguous())
    grad_q, grad_k, grad_v, grad_g, grad_beta = x.gradients(parts, grad, states, laters)
    return grad_q, grad_k, grad_v, grad_g, grad_initial, grad_beta, q.new_empty(0)


class _Parts(NamedTuple):
    """What is known of each chunk before the walk; see ``_triton_chunks.prepare``. ``q`` and ``k`` are as they come, or
    with the decays of their channels, for each of ``heads`` of their own."""

    erase: Tensor
    written: Tensor
    scores: Tensor
    solved: Tensor | None
    source: Tensor | None
    into: Tensor | None
    out: Tensor | None
    through: Tensor | None
    q: Tensor
    k: Tensor
    repeats: int
    decay: Tensor | None


class _Chunks:
    """Sizes and inputs that all kernels share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, start: Tensor | None
    ) -> None:
        (self.batch, self.length, self.groups, self.K), (_, _, self.heads, self.P) = q.shape, v.shape
        self.q, self.k, self.v, self.beta = _triton.rows(q), _triton.rows(k), _triton.rows(v), beta
        self.start = None if start is None else start.contiguous()
        self.log_decay = log_decay
        self.by_channel = log_decay is not None and log_decay.ndim == 4
        self.repeats = self.heads // max(self.groups, 1)
        self.kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        # Three products of TF32 leave out what is 2^-22 of a product of float32. NumPy, which the interpreter computes
        # with, has no bfloat16.
        wide = self.kind is torch.bfloat16 and _triton.interpreted
        self.precision = "wide" if wide else "tf32x3"
        # The inverse is rounded to 8 or 11 bits afterwards where products are of narrow types: those of TF32 keep 11.
        self.solve = "tf32x3" if self.kind is torch.float32 else "tf32"
        chunk = (_triton_tiles.CHUNK_FLOAT32 if self.kind is torch.float32 else _triton_tiles.CHUNK)(q)
        self.C, sub = chunk["C"], chunk["SUB"]
        self.chunks = _triton.cdiv(self.length, self.C)
        self.blocks = dict(SUB=sub, LEVELS=self.C.bit_length() - 1, INNER=sub.bit_length() - 1)
        self.sizes = dict(batch=self.batch, length=self.length, heads=self.heads, k=self.K, p=self.P)
        self.widths = dict(K=self.K, P=self.P, C=self.C, PRECISION=self.precision)

    def tiles(self, declared: _triton.Tiles) -> dict[str, int]:
        """Return a kernel's tiles, no larger than the widths that they are of."""
        tiles = declared(self.v, **self.sizes)
        for name, width in (("KB", self.K), ("PB", self.P)):
            if name in tiles:
                most = 16 if self.kind is torch.float32 else 64
                tiles[name] = min(tiles[name], most, _triton.power_of_2(width, 1 if _triton.interpreted else 16))
        return tiles

    def scratch(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return room for ``[b n·c h width]``, where a head's steps lie side by side: ``[b h n c width]``."""
        shape = (self.batch, self.heads, self.chunks * self.C, width)
        return self.v.new_empty(shape, dtype=dtype or self.kind).transpose(1, 2)

    def step(self, initial: Tensor | None, y: Tensor, final: Tensor) -> None:
        tiles = self.tiles(_triton_tiles.STEP)
        grid = (self.batch * self.heads, _triton.cdiv(self.P, tiles["PB"]))
        decay = None if self.log_decay is None else _triton.rows(self.log_decay) if self.by_channel else self.log_decay
        given = (self.q, self.k, self.v, self.beta, decay)
        _triton.launch(
            _triton_walk.step, grid, self.q, *given[1:], self.start, initial, y, final, *_strides(*given),
            self.heads, self.repeats,
            K=self.K, P=self.P, KB=_triton.power_of_2(self.K), CHANNELS=self.by_channel, **tiles,
        )  # fmt: skip

    def sums(self) -> Tensor | None:
        """Return the running sums of the decays of channels; those of heads as they are."""
        if self.log_decay is None or not self.by_channel:
            return self.log_decay
        tiles = self.tiles(_triton_tiles.PREPARE_BY_CHANNEL)
        decay, sums = _triton.rows(self.log_decay), self.scratch(self.K, torch.float32)
        _triton.launch(
            _triton_chunks.sums,
            (self.batch * self.heads * self.chunks, _triton.cdiv(self.K, tiles["KB"])),
            decay, sums, *decay.stride()[:3], self.length, self.heads, self.chunks,
            K=self.K, C=self.C, KB=tiles["KB"], num_warps=tiles["num_warps"],
        )  # fmt: skip
        return sums

    def prepare(self, grad: Tensor | None) -> _Parts:
        """Return what the walk needs; and what the backward pass does, given the gradient of the outputs."""
        decay, marked = self.sums(), self.start is not None
        single = (self.batch, self.heads, self.chunks)
        by_head = (marked or decay is not None) and not self.by_channel
        into = self.v.new_empty(*single, self.C, dtype=torch.float32) if by_head or marked else None
        out = self.v.new_empty(*single, self.C, dtype=torch.float32) if by_head or marked else None
        through = None
        if by_head or self.by_channel:
            through = self.v.new_empty(*single, self.K if self.by_channel else 1, dtype=torch.float32)
        parts = _Parts(
            self.scratch(self.K),
            self.scratch(self.P),
            self.scratch(self.C),
            None if grad is None else self.scratch(self.C),
            None if grad is None else self.scratch(self.P),
            into,
            out,
            through,
            self.scratch(self.K) if self.by_channel else self.q,
            self.scratch(self.K) if self.by_channel else self.k,
            1 if self.by_channel else self.repeats,
            decay,
        )
        new = (parts.q, parts.k) if self.by_channel else (None, None)
        tiles = self.tiles(_triton_tiles.PREPARE_BY_CHANNEL if self.by_channel else _triton_tiles.PREPARE)
        _triton.launch(
            _triton_chunks.prepare,
            (self.batch * self.heads * self.chunks,),
            self.q, self.k, self.v, self.beta, decay, self.start, grad, *parts[:8], *new,
            *_strides(self.q, self.k, self.v, self.beta, decay, grad),
            self.length, self.chunks, self.heads, self.repeats,
            **self.widths, **self.blocks, **tiles,
            CHANNELS=self.by_channel, SOLVE=self.solve,
        )  # fmt: skip
        return parts

    def walk_tiles(self, declared: _triton.Tiles, walks: int) -> tuple[dict[str, int], int, int]:
        """Return the tiles of a walk, its number of programs, and how many a GPU has room for.

        With two stages, what a chunk needs is asked for when the one before is done; with three, a chunk earlier. A
        program that is alone on its multiprocessor takes as many as there is memory for, and one that is not leaves
        half of it to another, if two stages fit there: they wait at different times then.
        """
        tiles, K = self.tiles(declared), _triton.power_of_2(self.K, 16)
        if K > 128:  # the state is as high: twice the registers
            tiles["num_warps"] = max(8, tiles["num_warps"])
        programs = walks * self.batch * self.heads * _triton.cdiv(max(self.K, self.P), tiles["PB"])
        rows = 3 if declared is _triton_tiles.WALK_BACK else 2  # tiles of keys; one less of values
        size, (places, memory) = torch.finfo(self.kind).bits // 8, _triton_tiles.gpu(self.v)
        stage, rest = self.C * (rows * K + (rows - 1) * tiles["PB"]) * size, K * tiles["PB"] * 4 + 1024
        crowded = programs > places and 2 * (2 * stage + rest) <= memory
        fit = (memory // (2 if crowded else 1) - rest) // stage
        # Products of float32 leave no registers for addresses of later loads.
        tiles["num_stages"] = 1 if self.kind is torch.float32 else max(1, min(tiles["num_stages"], fit))
        # Eight warps have room for all registers that a thread can have.
        beside = min(8 // tiles["num_warps"], memory // (tiles["num_stages"] * stage + rest))
        return tiles, programs, places * max(beside, 1)

    def every(self, declared: _triton.Tiles) -> int:
        """Return over how many chunks to walk at once."""
        return _triton.cdiv(self.chunks, _triton_tiles.segments(self.chunks, *self.walk_tiles(declared, 1)[1:]))

    def walk(
        self, parts: _Parts, initial: Tensor | None, kept: Tensor | None, keep: int, final: Tensor | None
    ) -> Tensor:
        """Walk over the sequence; return the states before chunks, and leave what is written in ``parts.written``."""
        every = self.every(_triton_tiles.WALK)
        if every < self.chunks:
            initial = self.combine(self.ends(parts, parts.written, every), self.ends(parts, None, every), initial)
        return self.walk_from(parts, initial, every, kept, keep, final)

    def walk_from(
        self, parts: _Parts, initial: Tensor | None, every: int, kept: Tensor | None, keep: int, final: Tensor | None
    ) -> Tensor:
        """Do the same by walks over ``every`` chunks from a state each."""
        states = self.v.new_empty(self.batch, self.heads, self.chunks, self.K, self.P, dtype=self.kind)
        self.forward(parts, parts.written, self.P, initial, every, states, kept, keep, final)
        return states

    def ends(self, parts: _Parts, written: Tensor | None, every: int) -> Tensor:
        """Return the states after walks from zero ``[walks b h k p]``; or, where nothing is written, their maps."""
        width = self.K if written is None else self.P
        ends = self.v.new_empty(
            _triton.cdiv(self.chunks, every), self.batch, self.heads, self.K, width, dtype=torch.float32
        )
        self.forward(parts, written, width, None, every, None, None, 0, ends)
        return ends

    def forward(
        self, parts: _Parts, written: Tensor | None, width: int, initial: Tensor | None, every: int,
        states: Tensor | None, kept: Tensor | None, keep: int, final: Tensor | None,
    ) -> None:  # fmt: skip
        lines, walks = self.batch * self.heads, max(1, _triton.cdiv(self.chunks, max(every, 1)))
        tiles, _, _ = self.walk_tiles(_triton_tiles.WALK, walks)
        _triton.launch(
            _triton_walk.forward,
            (lines, _triton.cdiv(width, tiles["PB"]), walks),
            parts.k, written, parts.erase, parts.into, parts.out, parts.through, initial, states, kept, final,
            *_strides(parts.k), self.length, self.chunks, self.heads, parts.repeats, lines, every, keep // self.C,
            **self.widths | dict(P=width), **tiles, KB=_triton.power_of_2(self.K, 16), CHANNELS=self.by_channel,
        )  # fmt: skip

    def combine(self, ends: Tensor, maps: Tensor, given: Tensor | None, back: bool = False) -> Tensor:
        """Return the states before walks, or ``back`` the gradients of those after them."""
        states, tiles, lines = torch.empty_like(ends), self.tiles(_triton_tiles.COMBINE), self.batch * self.heads
        _triton.launch(
            _triton_walk.combine, (lines, _triton.cdiv(self.P, tiles["PB"])), ends, maps, given, states,
            lines, ends.shape[0], K=self.K, P=self.P, ROWS=_triton.power_of_2(self.K, 16), BACK=back, **tiles,
        )  # fmt: skip
        return states

    def outputs(self, parts: _Parts, states: Tensor, y: Tensor) -> None:
        tiles = self.tiles(_triton_tiles.OUTPUTS)
        _triton.launch(
            _triton_chunks.outputs,
            (self.batch * self.heads * self.chunks, _triton.cdiv(self.P, tiles["PB"])),
            parts.q, y, parts.written, parts.scores, parts.into, self.start, states, *_strides(parts.q),
            self.length, self.chunks, self.heads, parts.repeats, **self.widths, **tiles,
        )  # fmt: skip

    def walk_back(self, parts: _Parts, grad: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradients of the states after chunks and of the initial one; leave that of what is written in
        ``parts.source``."""
        laters = self.v.new_empty(self.batch, self.heads, self.chunks, self.K, self.P, dtype=self.kind)
        first = self.v.new_empty(1, self.batch, self.heads, self.K, self.P, dtype=torch.float32)
        every = self.every(_triton_tiles.WALK_BACK)
        if every < self.chunks:
            maps = self.ends(parts, None, every)
            ends = first.new_empty(maps.shape[0], *first.shape[1:])
            self.backward(parts, grad, every, None, None, ends)
            last = self.combine(ends, maps, last, back=True)
        self.backward(parts, grad, every, last, laters, first)
        return laters, first[0]

    def backward(
        self, parts: _Parts, grad: Tensor, every: int, last: Tensor | None, laters: Tensor | None, first: Tensor
    ) -> None:
        lines, walks = self.batch * self.heads, max(1, _triton.cdiv(self.chunks, max(every, 1)))
        tiles, _, _ = self.walk_tiles(_triton_tiles.WALK_BACK, walks)
        _triton.launch(
            _triton_walk.backward,
            (lines, _triton.cdiv(self.P, tiles["PB"]), walks),
            parts.q, parts.k, grad, parts.source, parts.erase, parts.into, parts.out, parts.through,
            last, laters, first,
            *_strides(parts.q, parts.k, grad), self.length, self.chunks, self.heads, parts.repeats, lines, every,
            **self.widths, **tiles, KB=_triton.power_of_2(self.K, 16), CHANNELS=self.by_channel,
        )  # fmt: skip

    def gradients(self, parts: _Parts, grad: Tensor, states: Tensor, laters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v, log_decay and β."""
        each, scores, keys = self.batch * self.chunks, self.scratch(self.C), self.scratch(self.C)
        sides = self.v.new_empty(self.batch, self.chunks * self.C, self.heads, dtype=torch.float32)
        grad_q, grad_k, grad_v = (_empty_like(x) for x in (self.q, self.k, self.v))
        _triton.launch(
            _triton_gradients.squares,
            (each * self.heads,),
            self.v, parts.decay, self.beta, self.start, grad, parts.written, parts.source, parts.solved,
            grad_v, scores, keys, sides, *_strides(self.v, parts.decay, self.beta, grad),
            self.length, self.chunks, self.heads,
            P=self.P, C=self.C, PRECISION=self.precision, CHANNELS=self.by_channel, **self.tiles(_triton_tiles.SQUARES),
        )  # fmt: skip
        tiles = self.tiles(_triton_tiles.ROWS_BY_CHANNEL if self.by_channel else _triton_tiles.ROWS)
        columns = _triton.cdiv(self.K, tiles["KB"])
        grad_beta = sides.new_empty(columns, self.batch, self.length, self.heads)
        grad_g = None if self.log_decay is None else torch.empty_like(grad_beta)
        if self.by_channel and self.log_decay is not None:
            grad_g = _empty_like(self.log_decay)
        _triton.launch(
            _triton_gradients.rows_of,
            (each * self.groups, columns),
            self.q, self.k, parts.decay, self.beta, self.start, grad, parts.source, parts.written, states, laters,
            scores, keys, sides, grad_q, grad_k, grad_g, grad_beta,
            *_strides(self.q, self.k, parts.decay, self.beta, grad),
            self.length, self.batch, self.chunks, self.groups, self.repeats,
            **self.widths, **self.blocks, **tiles, CHANNELS=self.by_channel,
        )  # fmt: skip
        if grad_g is None or self.log_decay is None:
            grad_g = self.q.new_empty(0)
        elif not self.by_channel:
            grad_g = grad_g.sum(0).to(self.log_decay.dtype)
        return grad_q, grad_k, grad_v, grad_g, grad_beta.sum(0).to(self.beta.dtype)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the strides of batch, time and head of each tensor."""
    return tuple(n for x in tensors for n in ((0, 0, 0) if x is None else x.stride()[:3]))
