"""The delta rule on GPUs: chunks by themselves, a walk from chunk to chunk, and chunks by themselves again.

See ``chunked`` for what is computed. The system of a chunk is inverted (T = (I + B)⁻¹), so that the walk has two
products for each chunk, U = U₀ − W S and S ← through S + K_outᵀ U. Backwards, where X is the gradient of U, Wᵀ X is
what its state's gradient loses: that walk needs nothing that the walk forward has not.

What goes into a product of matrices is in the type of q, k and v, if they have one, and in float32 else; sums, states
and decays are in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._shapes import Tensor
from .. import _triton
from . import _triton_chunks, _triton_gradients, _triton_walk

_CHUNK = _triton.Tiles(
    "delta_rule.chunk", dict(C=64, SUB=16), interpreter=dict(C=8, SUB=4), space=dict(C=(32, 64), SUB=(16,))
)
# Float32 takes twice the room, and three times in the making of its products.
_CHUNK_FLOAT32 = _triton.Tiles(
    "delta_rule.chunk_float32", dict(C=32, SUB=16), interpreter=dict(C=8, SUB=4), space=dict(C=(32, 64), SUB=(16,))
)
_WARPS: dict[str, tuple[int, ...]] = dict(num_warps=(2, 4, 8), num_stages=(1, 2, 3))
_PREPARE = _triton.Tiles(
    "delta_rule.prepare",
    dict(KB=64, PB=64, num_warps=4, num_stages=1),
    interpreter=dict(KB=4, PB=4),
    space=dict(_WARPS, KB=(32, 64, 128), PB=(32, 64, 128)),
)
_PREPARE_BY_CHANNEL = _triton.Tiles(
    "delta_rule.prepare_by_channel",
    dict(KB=32, PB=64, num_warps=4, num_stages=1),
    interpreter=dict(KB=4, PB=4),
    space=dict(_WARPS, KB=(32, 64, 128), PB=(32, 64, 128)),
)
_WALK = _triton.Tiles(
    "delta_rule.walk",
    dict(PB=32, num_warps=4, num_stages=2),
    interpreter=dict(PB=4),
    space=dict(_WARPS, PB=(16, 32, 64)),
)
_WALK_BACK = _triton.Tiles(
    "delta_rule.walk_back",
    dict(PB=32, num_warps=4, num_stages=2),
    interpreter=dict(PB=4),
    space=dict(_WARPS, PB=(16, 32, 64)),
)
_OUTPUTS = _triton.Tiles(
    "delta_rule.outputs",
    dict(KB=64, PB=64, num_warps=4, num_stages=2),
    interpreter=dict(KB=4, PB=4),
    space=dict(_WARPS, KB=(32, 64, 128), PB=(32, 64, 128)),
)
_SQUARES = _triton.Tiles(
    "delta_rule.squares",
    dict(PB=64, num_warps=4, num_stages=1),
    interpreter=dict(PB=4),
    space=dict(_WARPS, PB=(32, 64, 128)),
)
_ROWS = _triton.Tiles(
    "delta_rule.rows",
    dict(KB=64, PB=64, num_warps=8, num_stages=1),
    interpreter=dict(KB=4, PB=4),
    space=dict(_WARPS, KB=(32, 64), PB=(32, 64)),
)
_ROWS_BY_CHANNEL = _triton.Tiles(
    "delta_rule.rows_by_channel",
    dict(KB=32, PB=64, num_warps=8, num_stages=1),
    interpreter=dict(KB=4, PB=4),
    space=dict(_WARPS, KB=(32, 64), PB=(32, 64)),
)
_STEP = _triton.Tiles(
    "delta_rule.step",
    dict(PB=16, num_warps=4),
    interpreter=dict(PB=4),
    space=dict(PB=(8, 16, 32), num_warps=(1, 2, 4, 8)),
)


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
    states = x.walk(parts, initial, x.chunks, kept, keep, final)
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
    grad = _in_rows(grad)
    parts = x.prepare(grad)
    states = x.walk(parts, kept.contiguous(), keep // x.C, None, keep, None)
    grad_initial = x.state()
    laters = x.walk_back(parts, grad, None if grad_final is None else grad_final.float().contiguous(), grad_initial)
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
        self.q, self.k, self.v, self.beta = _in_rows(q), _in_rows(k), _in_rows(v), beta
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
        chunk = (_CHUNK_FLOAT32 if self.kind is torch.float32 else _CHUNK)(q)
        self.C, sub = chunk["C"], chunk["SUB"]
        self.chunks = _triton.cdiv(self.length, self.C)
        self.blocks = dict(SUB=sub, LEVELS=self.C.bit_length() - 1, INNER=sub.bit_length() - 1)
        self.sizes = dict(batch=self.batch, length=self.length, heads=self.heads, k=self.K, p=self.P)
        self.widths = dict(K=self.K, P=self.P, C=self.C, PRECISION=self.precision)

    def state(self) -> Tensor:
        return self.v.new_empty(self.batch, self.heads, self.K, self.P, dtype=torch.float32)

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
        tiles = self.tiles(_STEP)
        grid = (self.batch * self.heads, _triton.cdiv(self.P, tiles["PB"]))
        decay = None if self.log_decay is None else _in_rows(self.log_decay) if self.by_channel else self.log_decay
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
        tiles = self.tiles(_PREPARE_BY_CHANNEL)
        decay, sums = _in_rows(self.log_decay), self.scratch(self.K, torch.float32)
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
        _triton.launch(
            _triton_chunks.prepare,
            (self.batch * self.heads * self.chunks,),
            self.q, self.k, self.v, self.beta, decay, self.start, grad, *parts[:8], *new,
            *_strides(self.q, self.k, self.v, self.beta, decay, grad),
            self.length, self.chunks, self.heads, self.repeats,
            **self.widths, **self.blocks, **self.tiles(_PREPARE_BY_CHANNEL if self.by_channel else _PREPARE),
            CHANNELS=self.by_channel, SOLVE=self.solve,
        )  # fmt: skip
        return parts

    def walk(
        self, parts: _Parts, initial: Tensor | None, every: int, kept: Tensor | None, keep: int, final: Tensor | None
    ) -> Tensor:
        """Walk over the sequence, or over ``every`` chunks of it from a state of its own; return the states before
        chunks, and leave what is written in ``parts.written``."""
        tiles = self.tiles(_WALK)
        states = self.v.new_empty(self.batch, self.heads, self.chunks, self.K, self.P, dtype=self.kind)
        lines, walks = self.batch * self.heads, _triton.cdiv(self.chunks, max(every, 1)) if final is None else 1
        _triton.launch(
            _triton_walk.forward,
            (lines, _triton.cdiv(self.P, tiles["PB"]), walks),
            parts.k, parts.written, parts.erase, parts.into, parts.out, parts.through, initial, states, kept, final,
            *_strides(parts.k), self.length, self.chunks, self.heads, parts.repeats, lines, every, keep // self.C,
            **self.widths, **tiles, KB=_triton.power_of_2(self.K, 16), CHANNELS=self.by_channel,
        )  # fmt: skip
        return states

    def outputs(self, parts: _Parts, states: Tensor, y: Tensor) -> None:
        tiles = self.tiles(_OUTPUTS)
        _triton.launch(
            _triton_chunks.outputs,
            (self.batch * self.heads * self.chunks, _triton.cdiv(self.P, tiles["PB"])),
            parts.q, y, parts.written, parts.scores, parts.into, states, *_strides(parts.q),
            self.length, self.chunks, self.heads, parts.repeats, **self.widths, **tiles,
        )  # fmt: skip

    def walk_back(self, parts: _Parts, grad: Tensor, last: Tensor | None, first: Tensor) -> Tensor:
        """Return the gradients of the states after chunks; leave that of what is written in ``parts.source``."""
        tiles = self.tiles(_WALK_BACK)
        if self.K > 128:  # four of its tiles are as wide as keys: two stages of them would take all of the memory
            tiles["num_stages"] = 1
        laters = self.v.new_empty(self.batch, self.heads, self.chunks, self.K, self.P, dtype=self.kind)
        _triton.launch(
            _triton_walk.backward,
            (self.batch * self.heads, _triton.cdiv(self.P, tiles["PB"])),
            parts.q, parts.k, grad, parts.source, parts.erase, parts.into, parts.out, parts.through,
            last, laters, first,
            *_strides(parts.q, parts.k, grad), self.length, self.chunks, self.heads, parts.repeats,
            **self.widths, **tiles, KB=_triton.power_of_2(self.K, 16), CHANNELS=self.by_channel,
        )  # fmt: skip
        return laters

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
            P=self.P, C=self.C, PRECISION=self.precision, CHANNELS=self.by_channel, **self.tiles(_SQUARES),
        )  # fmt: skip
        tiles = self.tiles(_ROWS_BY_CHANNEL if self.by_channel else _ROWS)
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


def _in_rows(x: Tensor) -> Tensor:
    """Return ``[… n]`` with its last axis side by side; a copy if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the strides of batch, time and head of each tensor."""
    return tuple(n for x in tensors for n in ((0, 0, 0) if x is None else x.stride()[:3]))
