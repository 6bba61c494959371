"""The Triton kernels of linear attention: chunks as matrix products, the state between them in registers.

One kernel walks over the chunks of a sequence with the state of some channels of a head, and writes outputs, or states
for the backward pass. Where there are too few sequences and heads to fill a GPU, time is cut into segments: what each
adds to the state is found first, then put together, then every segment runs from its own state.

The backward pass starts from the few states that the forward pass kept. It writes the states before all chunks and the
adjoints of those after them (the same walk, back in time), from which every chunk has its gradients by itself.
"""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor
from .. import _triton
from .._triton import cdiv, power_of_2
from . import _triton_by_channel, _triton_by_head, _triton_walk
from ._triton_given import Given, sub
from ._triton_tiles import BY_CHANNEL, BY_HEAD, COMBINE, WALK


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    dt: Tensor | None,
    D: Tensor | None,
    start: Tensor | None,
    erases: bool,
    keep: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t h p]``, the final state ``[b h k p]`` and the states around tiles ``[j+1 b h k p]``.

    If it ``erases``, what the state held at each key is taken from the value before it is written: the delta rule. The
    states around tiles are for the backward pass, one every ``keep`` steps, ``narrow`` ones in bfloat16; none where it
    is 0.
    """
    if erases:
        from ..delta_rule import triton as delta

        assert dt is not None  # β
        return delta.delta_rule(q, k, v, log_decay, initial, dt, start, keep)
    given = Given(q, k, v, log_decay, dt, D, start)
    initial = native.side_by_side(initial)
    single = given.length == 1 and not keep
    y, final = v.new_empty(v.shape), _triton.final_state(initial, given.state, v, single)
    if single:
        given.step(initial, y, final)
        return y, final, final.new_empty(0)
    kept = None
    if keep:
        shape = (cdiv(given.length, keep) + 1, *given.state)
        kept = v.new_empty(shape, dtype=torch.bfloat16 if narrow else torch.float32)
    chunk = given.chunk(WALK, keep)
    _Walk(given, chunk, given.prepared(chunk)).forward(initial, y, final, kept, keep)
    return y, final, final.new_empty(0) if kept is None else kept


def token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    bias: Tensor,
    A_log: Tensor,
    limit: tuple[float, float],
    D: Tensor,
    state: Tensor,
) -> Tensor:
    """Take a step of Mamba-2 ``[b 1 h p]``, and write the state after it where that before is.

    Δ = clamp(softplus(dt + bias), limit),    S ← e^{−Δ e^{A_log}} S + k (Δ v)ᵀ,    y = Sᵀ q + D v
    """
    y = v.new_empty(v.shape)
    Given(q, k, v, None, dt, D, None).step(state, y, state, bias, A_log, (float(limit[0]), float(limit[1])))
    return y


def linear_attention_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    dt: Tensor | None,
    D: Tensor | None,
    start: Tensor | None,
    kept: Tensor,
    erases: bool,
    keep: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, log_decay, the initial state, dt and D; empty ones where there is none."""
    if erases:
        from ..delta_rule import triton as delta

        assert dt is not None  # β
        return delta.delta_rule_backward(grad, grad_final, q, k, v, log_decay, dt, start, kept, keep)
    given, grad = Given(q, k, v, log_decay, dt, D, start), _triton.rows(grad)
    chunk = given.chunk(BY_CHANNEL if given.by_channel else BY_HEAD, keep)
    prepared, chunks = given.prepared(chunk), cdiv(given.length, chunk)
    between = 1 if given.by_channel else 2
    later = v.new_empty((cdiv(chunks, between), *given.state), dtype=given.operands())
    grad_initial = v.new_empty(given.state, dtype=torch.float32)
    walk = _Walk(given, chunk, prepared)
    states = kept.contiguous()
    if keep != between * chunk or kept.dtype != later.dtype:
        states = torch.empty_like(later)
        walk.again(kept.contiguous(), states, keep, between)
    walk.backward(grad, native.side_by_side(grad_final), grad_initial, later, between)
    grad_v, grad_dt = v.new_empty(v.shape), None if dt is None else dt.new_empty(dt.shape)
    heads, values = v.shape[2:]
    grad_D = None if D is None else v.new_empty((v.shape[0], chunks, heads, values), dtype=torch.float32)
    if prepared is None:
        grad_q, grad_k, grad_g = _by_head(given, chunk, walk.sums, grad, states, later, grad_v, grad_dt, grad_D)
    else:
        grad_q, grad_k, grad_g = _by_channel(given, chunk, prepared, grad, states, later, grad_v, grad_dt, grad_D)
    if D is not None and grad_D is not None:
        grad_D = grad_D.sum((0, 1) if D.ndim == 2 else (0, 1, 3)).to(D.dtype)
    optional = (x if x is not None else v.new_empty(0) for x in (grad_g, grad_initial, grad_dt, grad_D))
    return grad_q, grad_k, grad_v, *optional


class _Walk:
    """What walks over the chunks of given arguments."""

    def __init__(self, given: Given, chunk: int, prepared: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> None:
        self.given, self.chunk, self.chunks = given, chunk, cdiv(given.length, chunk)
        self.q, self.k, self.shared = given.q, given.k, given.shared
        self.sums = given.sums(chunk)
        self.scores = self.through = None
        if prepared is not None:
            self.scores, self.q, self.k, self.through = prepared
            self.shared = 1

    def forward(self, initial: Tensor | None, y: Tensor, final: Tensor, kept: Tensor | None, keep: int) -> None:
        """Write outputs, the final state and the states around tiles of ``keep`` steps."""
        between = keep // self.chunk if keep else 1
        segment, initial = self._segments(initial, between, self.given.v, self.given.dt, False)
        self._launch(self.given.v, self.given.dt, initial, segment, False, y, final, kept, between)

    def again(self, kept: Tensor, states: Tensor, keep: int, between: int) -> None:
        """Write the states before every ``between`` chunks, tile by tile of ``keep`` steps."""
        self._launch(self.given.v, self.given.dt, kept, keep // self.chunk, False, None, None, states, between)

    def backward(
        self, grad: Tensor, grad_final: Tensor | None, grad_initial: Tensor, later: Tensor, between: int
    ) -> None:
        """Write the adjoints of the states after every ``between`` chunks and of the first."""
        segment, after = self._segments(grad_final, 1, grad, None, True)
        self._launch(grad, None, after, segment, True, None, grad_initial, later, between)

    def _segments(
        self, initial: Tensor | None, multiple: int, v: Tensor, dt: Tensor | None, reverse: bool
    ) -> tuple[int, Tensor | None]:
        """Return the length of a segment (in chunks, a multiple of some) and the states before all of them."""
        given, use = self.given, self._use()
        programs = max(1, given.batch * given.heads * cdiv(given.values, use["VALUES"]))
        many = max(1, min(use["PROGRAMS"] // programs, self.chunks // 2))
        length = max(1, cdiv(self.chunks, many * multiple) * multiple)
        many = cdiv(self.chunks, length)
        if many < 2:
            return length, initial
        states = v.new_empty((many, *given.state), dtype=torch.float32)
        left = v.new_empty((many, *given.state[:3]), dtype=torch.float32)
        self._launch(v, dt, None, length, reverse, None, states, None, left=left)
        pick = COMBINE(v, keys=given.keys, values=given.values)
        grid = (given.batch * given.heads, cdiv(given.keys * given.values, pick["BLOCK"]))
        _triton.launch(
            _triton_walk.combine, grid, states, left, initial, many, given.keys, given.values, REVERSE=reverse, **pick
        )
        return length, states

    def _use(self) -> dict[str, int]:
        given = self.given
        use = dict(WALK[given.exact](given.v, keys=given.keys, values=given.values))
        # The state of a program is held in registers.
        use["VALUES"] = min(use["VALUES"], power_of_2(given.values, 16), max(16, 128 * 128 // power_of_2(given.keys)))
        return use

    def _launch(
        self,
        v: Tensor,
        dt: Tensor | None,
        initial: Tensor | None,
        segment: int,
        reverse: bool,
        y: Tensor | None,
        final: Tensor | None,
        kept: Tensor | None,
        between: int = 1,
        left: Tensor | None = None,
    ) -> None:
        given, use = self.given, self._use()
        outputs = y is not None
        q, k = (self.q if outputs else None), (self.q if reverse else self.k)
        strides = (n for x in (v, q, k, dt) for n in ((0, 0, 0) if x is None else x.stride()[:3]))
        D, skips = (given.D, given.skips()) if outputs else (None, (0, 0))
        pairs = given.batch * given.heads
        _triton.launch(
            _triton_walk.walk, (pairs * cdiv(given.values, use["VALUES"]), max(1, cdiv(self.chunks, segment))),
            v, q, k, *self.sums, dt, D, given.document, self.scores if outputs else None, self.through,
            initial, y, final, kept, left, *strides, *skips,
            given.length, given.heads, self.shared, given.keys, given.values, segment, between,
            CHUNK=self.chunk, KEYS=power_of_2(given.keys, 16), VALUES=use["VALUES"], REVERSE=reverse,
            PRECISION=given.precision, num_warps=use["num_warps"], num_stages=use["num_stages"],
        )  # fmt: skip


def _by_head(
    given: Given,
    chunk: int,
    sums: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
    states: Tensor,
    later: Tensor,
    grad_v: Tensor,
    grad_dt: Tensor | None,
    grad_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and log_decay, and write the others."""
    chunks, use = cdiv(given.length, chunk), BY_HEAD[given.exact](given.v, keys=given.keys, values=given.values)
    grad_g = None
    if given.g is not None:
        shape = (2, given.batch, chunks if given.fixed else given.length, given.heads)
        grad_g = given.v.new_empty(shape, dtype=torch.float32)
    programs = 2 * given.batch * given.groups * chunks
    # Into how many pieces the heads of a group are cut, where groups and chunks are few: their sums are added up after.
    divisors = (n for n in range(1, given.shared + 1) if given.shared % n == 0)
    pieces = next((n for n in divisors if n * programs >= use["PROGRAMS"]), given.shared)
    parts = (pieces, given.batch, given.length, given.groups, given.keys)
    grad_q, grad_k = (x.new_empty(parts, dtype=x.dtype if pieces == 1 else torch.float32) for x in (given.q, given.k))
    _triton.launch(
        _triton_by_head.gradients, (2 * given.batch * given.groups * pieces * chunks,),
        grad, given.v, given.q, given.k, *sums, given.dt, given.D, given.document, states, later,
        grad_q, grad_k, grad_v, grad_g, grad_dt, grad_D,
        *grad.stride()[:3], *given.strides("v", "q", "k", "dt"), *given.skips(),
        given.length, given.heads, given.groups, given.keys, given.values, pieces, FIXED=given.fixed,
        CHUNK=chunk, KEYS=power_of_2(given.keys, 16), VALUES=min(use["VALUES"], power_of_2(given.values, 16)),
        PRECISION=given.precision, num_warps=use["num_warps"], num_stages=use["num_stages"],
    )  # fmt: skip
    if given.g is not None and grad_g is not None:
        grad_g = grad_g.sum((0, 1, 2) if given.fixed else 0).to(given.g.dtype)
    return _summed(grad_q, 0, given.q), _summed(grad_k, 0, given.k), grad_g


def _by_channel(
    given: Given,
    chunk: int,
    prepared: tuple[Tensor, Tensor, Tensor, Tensor],
    grad: Tensor,
    states: Tensor,
    later: Tensor,
    grad_v: Tensor,
    grad_dt: Tensor | None,
    grad_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and log_decay, and write the others."""
    chunks, use = cdiv(given.length, chunk), BY_CHANNEL[given.exact](given.v, keys=given.keys, values=given.values)
    scores, _, k_out, _ = prepared
    pairs, width, options = given.batch * given.heads, power_of_2(given.keys, 16), dict(
        CHUNK=chunk, PRECISION=given.precision, num_warps=use["num_warps"], num_stages=use["num_stages"],
        VALUES=min(use["VALUES"], power_of_2(given.values, 16)),
    )  # fmt: skip
    d_scores = torch.empty_like(scores)
    _triton.launch(
        _triton_by_channel.value_gradients, (pairs * chunks,),
        grad, given.v, given.dt, given.D, given.document, scores, k_out, later, d_scores, grad_v, grad_dt, grad_D,
        *grad.stride()[:3], *given.strides("v", "dt"), *given.skips(),
        given.length, given.heads, given.keys, given.values, KEYS=width, **options,
    )  # fmt: skip
    assert given.g is not None
    shape, keys = (given.batch, given.length, given.groups, given.shared, given.keys), min(use["KEYS"], width)
    grad_q, grad_k = (
        x.new_empty(shape, dtype=x.dtype if given.shared == 1 else torch.float32) for x in (given.q, given.k)
    )
    grad_g = given.g.new_empty(given.g.shape)
    _triton.launch(
        _triton_by_channel.key_gradients, (pairs * cdiv(given.keys, keys) * chunks,),
        grad, given.q, given.k, given.v, given.g, given.dt, given.document, d_scores, states, later,
        grad_q, grad_k, grad_g, *grad.stride()[:3], *given.strides("q", "k", "v", "g", "dt"),
        given.length, given.heads, given.shared, given.keys, given.values, SUB=sub(chunk), KEYS=keys, **options,
    )  # fmt: skip
    return _summed(grad_q, 3, given.q), _summed(grad_k, 3, given.k), grad_g


def _summed(parts: Tensor, axis: int, like: Tensor) -> Tensor:
    """Return the sum over an axis, in the type of ``like``."""
    return parts.squeeze(axis) if parts.shape[axis] == 1 else parts.sum(axis).to(like.dtype)
