"""Softmax attention, full or over a sliding window, with the mixer contract."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from .._shapes import Float, Int, Tensor
from ..timeline import Compaction, Timeline, segments, zero_where_invalid
from ._base import Mixer
from ._parts import Linear, RMSNorm, ShortConvolution


class AttentionState(NamedTuple):
    """The keys and values of all steps, and how many steps their sequence has had: the key of position p in slot p."""

    key: Float[Tensor, "b slots g p"]
    value: Float[Tensor, "b slots g p"]
    length: Int[Tensor, " b"]

    @property
    def growing(self) -> tuple[str, ...]:
        """The tensors that grow with the steps read."""
        return ("key", "value")


class WindowState(NamedTuple):
    """The keys and values that later steps may still see, and how many steps their sequence has had.

    A ring: the key of position p stands in slot p mod the window.
    """

    key: Float[Tensor, "b slots g p"]
    value: Float[Tensor, "b slots g p"]
    length: Int[Tensor, " b"]


class ConvolvedState(NamedTuple):
    """The window of the convolution, and what attention without one remembers."""

    conv: Float[Tensor, "b window d"]
    attention: AttentionState | WindowState


class Reading(NamedTuple):
    """How queries read keys and values of the past of the same sequence.

    Attributes:
        window: How many steps each step sees, itself included; all when ``None``.
        chunked: Whether steps see only their own chunk of ``window`` steps, and not that many before them.
        rotary_dim: Channels of a head that are rotated by the position.
        rotary_base: The longest wavelength is about 2π times this.
        scale: What scores are multiplied by; 1 / √(channels of a key) when ``None``.
    """

    window: int | None
    chunked: bool
    rotary_dim: int
    rotary_base: float
    scale: float | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | WindowState | None, timeline: Timeline
    ) -> tuple[Tensor, AttentionState | WindowState]:
        """Attend to the past and to the new steps, ``[b t h p]``, and return the state after them."""
        _, start, valid = timeline
        batch, length = q.shape[:2]
        compaction = None if valid is None else Compaction.of(valid)
        if compaction is not None:
            q, k, v = (compaction.compact(x) for x in (q, k, v))
            start = None if start is None else compaction.start(start)

        index = torch.arange(length, device=q.device)
        before = index.new_zeros(batch) if state is None else state.length
        position, segment = before[:, None] + index, torch.zeros_like(before)[:, None].expand(batch, length)
        began = None
        if start is not None:
            segment = segments(start)
            began = torch.where(start, index, -1).cummax(1).values
            position = torch.where(began < 0, position, index - began)
        q, k = self._rotate(q, position), self._rotate(k, position)
        past = None if state is None or state.key.shape[1] == 0 else _unrolled(state)
        any_length = torch.compiler.is_exporting()  # an exported graph cannot choose its way by the length
        inside = self.window is None or (not any_length and length <= self.window)
        if past is None and start is None and compaction is None and inside:
            y = _attend(q, k, v, None, self.scale)
        else:
            y = self._masked(q, k, v, past, before, position, segment)
        y = y if compaction is None else compaction.restore(y)

        count = before.new_full((batch,), length) if compaction is None else compaction.total
        total, origin = before + count, -before  # how long the last sequence is, and where its position 0 stands
        if began is not None:
            origin = torch.where(began[:, -1] < 0, origin, began[:, -1])
            total = torch.where(began[:, -1] < 0, total, (count - began[:, -1]).clamp(min=0))
        return y, self._ring(k, v, past, total, origin)

    def _masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: tuple[Tensor, Tensor] | None,
        before: Tensor,
        position: Tensor,
        segment: Tensor,
    ) -> Tensor:
        """Attend to the past and to the new steps of the same sequence, block by block where there is a window."""
        length = q.shape[1]
        slots = 0 if past is None else past[0].shape[1]
        if past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, (k, v), strict=True))
        old = before[:, None] - slots + torch.arange(slots, device=q.device)
        key_position = torch.cat([old, position], 1)
        # A slot not yet filled has a position below 0; it belongs to no sequence.
        key_segment = torch.cat([torch.where(old < 0, -1, 0), segment], 1)
        if self.window is None or torch.compiler.is_exporting() or length <= self.window:
            return _attend(q, k, v, self._visible(position, segment, key_position, key_segment), self.scale)
        # Blocks as long as the window: each sees itself and the one before.
        w = self.window
        fill = -length % w
        # Steps filled in at the end see each other and no other: a step that saw nothing would divide 0 by 0.
        q, position, segment = _filled(q, 0, fill), _filled(position, 0, fill), _filled(segment, 0, fill, -2)
        k, v, key_position = (_filled(x, w - slots, fill) for x in (k, v, key_position))
        key_segment = _filled(_filled(key_segment, w - slots, 0, -1), 0, fill, -2)
        q, position, segment = (x.unflatten(1, (-1, w)).flatten(0, 1) for x in (q, position, segment))
        k, v, key_position, key_segment = (_pairs(x, w) for x in (k, v, key_position, key_segment))
        y = _attend(q, k, v, self._visible(position, segment, key_position, key_segment), self.scale)
        return y.unflatten(0, (before.shape[0], -1)).flatten(1, 2)[:, :length]

    def _visible(self, position: Tensor, segment: Tensor, key_position: Tensor, key_segment: Tensor) -> Tensor:
        distance = position[..., None] - key_position[:, None]
        visible = (distance >= 0) & (segment[..., None] == key_segment[:, None])
        if self.window is None:
            return visible
        if self.chunked:
            return visible & (position[..., None] // self.window == (key_position // self.window)[:, None])
        return visible & (distance < self.window)

    def _ring(
        self, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, total: Tensor, origin: Tensor
    ) -> AttentionState | WindowState:
        """Return the ring after the last step: in each slot the newest position that belongs there."""
        slots = (0 if past is None else past[0].shape[1]) + k.shape[1] if self.window is None else self.window
        newest = total[:, None] - 1
        position = newest - (newest - torch.arange(slots, device=k.device)) % slots
        empty = position < 0
        offset = 0 if past is None else past[0].shape[1]
        source = (origin[:, None] + position + offset).masked_fill(empty, 0)
        key, value = (
            (new if past is None else torch.cat([old.to(new.dtype), new], 1))
            .gather(1, source[..., None, None].expand(*source.shape, *new.shape[2:]))
            .masked_fill(empty[..., None, None], 0)
            for old, new in zip(past or (k, v), (k, v), strict=True)
        )
        return AttentionState(key, value, total) if self.window is None else WindowState(key, value, total)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate the first channels of each head by the position, the first half against the second."""
        if self.rotary_dim == 0:
            return x
        half = self.rotary_dim // 2
        # In float64: position 100,000 times a frequency leaves three digits of the angle in float32.
        frequency = self.rotary_base ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
        angle = position[..., None, None].to(torch.float64) * frequency
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second, rest = x.split([half, half, x.shape[-1] - self.rotary_dim], -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


class Attention(Mixer):
    """Attend to the past of the same sequence, with rotary positions.

        y_t = W_o Σ_s softmax_s(scale · q_tᵀ k_s) v_s    over 0 ≤ t − s < window
        [q, k, v] = [W_q, W_k, W_v] u, through a short convolution if there is one; then q and k through a norm of each
        head if there is one; then rotated

    Args:
        d_model: Channels.
        n_heads: Heads of queries.
        n_kv_heads: Heads of keys and values, each shared by n_heads / n_kv_heads heads of queries; ``n_heads`` when
            absent.
        head_dim: Channels of a head; d_model / n_heads when absent.
        window: How many steps each step sees, itself included; all when absent.
        rotary_dim: Channels of a head that are rotated by the position; all when absent, 0 for none.
        rotary_base: The longest wavelength is about 2π times this.
        bias: Whether the projections have biases.
        scale: What scores are multiplied by; 1 / √head_dim when absent.
        out_bias: Whether the last projection has a bias; like the others when absent.
        qk_norm: Whether queries and keys pass through an RMSNorm of each head before they are rotated.
        norm_eps: Its ε.
        d_conv: Taps of a causal depthwise convolution of queries, keys and values; 0 for none.
        conv_bias: Whether it has a bias.

    Raises:
        ValueError: If the sizes do not go together; in ``forward``, if the timeline has ``dt``: attention counts steps.

    Source:
        Vaswani et al., arXiv:1706.03762; rotary: Su et al., arXiv:2104.09864; grouped queries: Ainslie et al.,
        arXiv:2305.13245; norms of queries and keys: Henry et al., arXiv:2010.04245; the convolution: Dao and Gu,
        arXiv:2405.21060, its hybrids.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        bias: bool = False,
        scale: float | None = None,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        d_conv: int = 0,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if window is not None and window < 1:
            raise ValueError(
                f"Attention(window={window}): a step sees at least itself. Take 1 or more, or None for all."
            )
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"Attention(scale={scale}): wanted a positive number, or None for 1 / √head_dim")
        if d_conv < 0:
            raise ValueError(f"Attention(d_conv={d_conv}): wanted a number of taps, such as 4, or 0 for no convolution")
        head_dim, rotary_dim = _sizes(d_model, n_heads, n_kv_heads, head_dim, rotary_dim)
        self.d_model, self.n_heads, self.n_kv_heads, self.head_dim = d_model, n_heads, n_kv_heads, head_dim
        self.window, self.rotary_dim, self.rotary_base, self.scale = window, rotary_dim, rotary_base, scale
        width, kv_width = n_heads * head_dim, n_kv_heads * head_dim
        self.q_proj = Linear(d_model, width, bias=bias)
        self.k_proj = Linear(d_model, kv_width, bias=bias)
        self.v_proj = Linear(d_model, kv_width, bias=bias)
        self.conv1d = ShortConvolution(width + 2 * kv_width, d_conv, conv_bias, None) if d_conv else None
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.o_proj = Linear(width, d_model, bias=bias if out_bias is None else out_bias)

    def reset_parameters(self) -> None:
        """Draw the projections."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.conv1d, self.q_norm, self.k_norm, self.o_proj):
            if module is not None:
                module.reset_parameters()

    def initial_state(self, batch_size: int) -> AttentionState | WindowState | ConvolvedState:
        """Return an empty ring: of the window, or without slots for full attention; and zeros for the convolution."""
        weight = self.k_proj.weight
        shape = (batch_size, self.window or 0, self.n_kv_heads, self.head_dim)
        state = empty_cache(weight, shape, shape, self.window)
        return state if self.conv1d is None else ConvolvedState(self.conv1d.initial_state(batch_size), state)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: AttentionState | WindowState | ConvolvedState | None = None,
        timeline: Timeline | None = None,
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | WindowState | ConvolvedState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline, timed=False)
        if x.shape[1] == 0:
            return x.clone(), state or self.initial_state(x.shape[0])
        q, k, v = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.conv1d is None:
            assert not isinstance(state, ConvolvedState)
            y, state = self._attend(q, k, v, state, timeline)
        else:
            assert state is None or isinstance(state, ConvolvedState)
            window, past = (None, None) if state is None else state
            widths = [z.shape[-1] for z in (q, k, v)]
            convolved, window = self.conv1d(torch.cat([q, k, v], -1), window, timeline)
            q, k, v = convolved.split(widths, -1)
            y, past = self._attend(q, k, v, past, timeline)
            state = ConvolvedState(window, past)
        return zero_where_invalid(self.o_proj(y), timeline.valid), state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | WindowState | None, timeline: Timeline
    ) -> tuple[Tensor, AttentionState | WindowState]:
        """Attend to the past and to the new steps, heads side by side, and return the state after them."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        reading = Reading(self.window, False, self.rotary_dim, self.rotary_base, self.scale)
        y, state = reading(q, k, v, state, timeline)
        return y.flatten(-2), state


def empty_cache(
    like: Tensor, key: tuple[int, ...], value: tuple[int, ...], window: int | None
) -> AttentionState | WindowState:
    """Return a cache of zeros ``[b slots g p]`` in which nothing has been read."""
    kind = AttentionState if window is None else WindowState
    return kind(like.new_zeros(key), like.new_zeros(value), like.new_zeros(key[0], dtype=torch.long))


def _sizes(
    d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None, rotary_dim: int | None
) -> tuple[int, int]:
    """Return the channels of a head, and how many of them are rotated."""
    if head_dim is None:
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"Attention(d_model={d_model}, n_heads={n_heads}): d_model is not a multiple of n_heads. "
                f"Choose head_dim, or a divisor of {d_model}."
            )
        head_dim = d_model // n_heads
    if head_dim < 1:
        raise ValueError(f"Attention(head_dim={head_dim}): a head has at least one channel")
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"Attention(n_heads={n_heads}, n_kv_heads={n_kv_heads}): n_kv_heads must divide n_heads")
    if rotary_dim is None:
        rotary_dim = head_dim
        if head_dim % 2:
            raise ValueError(
                f"Attention: a head has {head_dim} channels, and positions rotate pairs. Choose an even head_dim, "
                f"or rotary_dim={head_dim - 1}, or 0 for no positions."
            )
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"Attention(rotary_dim={rotary_dim}): wanted an even number from 0 to head_dim={head_dim}")
    return head_dim, rotary_dim


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """Attend ``[b t h p]``, to all before when there is no mask ``[b t s]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    mask = None if visible is None else visible[:, None]
    y = scaled_dot_product_attention(
        q, k, v, mask, is_causal=visible is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


def _unrolled(state: AttentionState | WindowState) -> tuple[Tensor, Tensor]:
    """Return the ring's keys and values, the oldest position first and the last one last."""
    slots = state.key.shape[1]
    slot = (state.length[:, None] + torch.arange(slots, device=state.length.device)) % slots
    slot = slot[..., None, None]
    key, value = (x.gather(1, slot.expand_as(x)) for x in (state.key, state.value))
    return key, value


def _filled(x: Tensor, front: int, back: int, value: int = 0) -> Tensor:
    return pad(x, (*[0] * (2 * (x.ndim - 2)), front, back), value=value)


def _pairs(x: Tensor, w: int) -> Tensor:
    """Return each block together with the one before it, ``[b·j 2w …]``; one block stands before the first."""
    blocks = x.unflatten(1, (-1, w))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2).flatten(0, 1)
