"""Fixed systems in chunks of c steps: matrix products within chunks, and a tree of powers of A^c between them.

With V_i = A^{c−1−i} B and R_i = C A^{i+1} (i < c), taps K_i = C A^i B, and X_j the state before chunk j,

    y_{jc+i} = Σ_{k≤i} K_{i−k} u_{jc+k} + R_i X_j,    X_{j+1} = A^c X_j + Σ_i V_i u_{jc+i}.

The powers depend on the parameters alone (``powers``); what depends on the sequence too is one op, ``state_space``. The
states X are 1/c of all. They come from odd–even reduction: two chunks are one of the matrix A^{2c}, and so on. Within a
chunk of several sequences, the taps are applied by halving: what the left half of a block sends to its right half
belongs to the one sequence that is alive at its middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..._shapes import Tensor
from ...timeline import segments

CHUNK = 64


class Powers(NamedTuple):
    """What the chunks of a system are made of.

    Attributes:
        taps: K ``[d c]``.
        write: V ``[d c n]``.
        read: R ``[d c n]``.
        through: A^c ``[d n n]``, in double precision.
        doublings: A, A², A⁴, … below A^c.
    """

    taps: Tensor
    write: Tensor
    read: Tensor
    through: Tensor
    doublings: list[Tensor]


def powers(A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Powers:
    """Return the powers of a system for chunks of 2^k steps, by k squarings of A in double precision."""
    dtype = A.dtype
    power, B, C = A.double(), B.double(), C.double()
    columns, rows, doublings = B[..., None], C[:, None] @ power, []
    while columns.shape[-1] < chunk:
        doublings.append(power.to(dtype))
        columns = torch.cat([columns, power @ columns], -1)
        rows = torch.cat([rows, rows @ power], 1)
        power = power @ power
    taps = torch.cat([C[:, None], rows[:, :-1]], 1) @ B[..., None]
    return Powers(taps[..., 0].to(dtype), columns.mT.flip(1).to(dtype), rows.to(dtype), power, doublings)


class _Cut(NamedTuple):
    """A sequence cut into chunks; each flag is 1 or 0, or absent where it would be 1 everywhere.

    Attributes:
        segment: Which sequence each step is of, ``[b j c]``.
        into: Whether the state before its chunk reaches a step, ``[b j c 1]``.
        out: Whether a step reaches the state after its chunk, ``[b j c 1]``.
        through: Whether the state before a chunk reaches the one after, ``[b j]``.
    """

    segment: Tensor | None = None
    into: Tensor | None = None
    out: Tensor | None = None
    through: Tensor | None = None


def _cut(start: Tensor | None, chunk: int, dtype: torch.dtype) -> _Cut:
    if start is None:
        return _Cut()
    segment = segments(pad(start, (0, -start.shape[1] % chunk))).unflatten(1, (-1, chunk))
    last = segment[..., -1]
    before = pad(last, (1, -1))[..., None]
    into, out = ((segment == one)[..., None].to(dtype) for one in (before, last[..., None]))
    return _Cut(segment, into, out, (last == before[..., 0]).to(dtype))


def _by_channel(x: Tensor, chunk: int) -> Tensor:
    """Return ``[b t d]`` as ``[d b j c]``, with zeros behind the last step."""
    return pad(x, (0, 0, 0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk)).permute(3, 0, 1, 2).contiguous()


def _by_step(x: Tensor, length: int) -> Tensor:
    return x.permute(1, 2, 3, 0).flatten(1, 2)[:, :length]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    """Return ``[d b j c]`` times ``[b j c 1]``, or ``[d b j n]`` times ``[b j]``."""
    if factor is None:
        return x
    return x * (factor[..., 0] if factor.ndim == 4 else factor[..., None])


def _apply(x: Tensor, matrix: Tensor) -> Tensor:
    """Return the rows x ``[d b j m]`` times ``[d m n]``, or one matrix for all channels ``[1 m n]``."""
    return (x.flatten(1, 2) @ matrix).unflatten(1, x.shape[1:3])


def state_space(
    u: Tensor, taps: Tensor, write: Tensor, read: Tensor, through: Tensor, initial: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[b t d]`` and the states before and after all chunks ``[b j+1 d n]``."""
    chunk = taps.shape[1]
    blocks, cut = _by_channel(u, chunk), _cut(start, chunk, u.dtype)
    y = torch.zeros_like(blocks)
    for block in _blocks(chunk, cut.segment, u.device):
        # A view of the outputs, to which is added.
        block.receivers(y).add_(block.masked(block.senders(blocks) @ block.matrix(taps)))
    written = _apply(_times(blocks, cut.out), write)
    states = _between(through, written, cut.through, initial.transpose(0, 1))
    y += _times(_apply(states[:, :, :-1], read.mT), cut.into)
    return _by_step(y, u.shape[1]), states.permute(1, 2, 0, 3)


def state_space_backward(
    grad: Tensor,
    grad_states: Tensor,
    u: Tensor,
    taps: Tensor,
    write: Tensor,
    read: Tensor,
    through: Tensor,
    start: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, taps, write, read, through and the initial state.

    Those of the states come from the same tree, backwards in time.
    """
    chunk, dtype = taps.shape[1], u.dtype
    blocks, g, cut = _by_channel(u, chunk), _by_channel(grad, chunk), _cut(start, chunk, dtype)
    grad_u, grad_taps = torch.zeros_like(blocks), taps.new_zeros(len(taps), chunk + 1)
    for block in _blocks(chunk, cut.segment, u.device):
        received, sent = block.masked(block.receivers(g)), block.senders(blocks)
        block.senders(grad_u, raw=True).add_(block.masked_senders(received @ block.matrix(taps).mT))
        grad_taps.index_add_(1, block.lags.flatten(), (sent.mT @ received).flatten(1))
    read_here, sent_here = _times(g, cut.into), _times(blocks, cut.out)
    of_states = grad_states.permute(2, 0, 1, 3)
    reading = _apply(read_here, read) + of_states[:, :, :-1]
    kept = None if cut.through is None else cut.through.flip(1)
    adjoint = _between(through.mT, reading.flip(2), kept, of_states[:, :, -1]).flip(2)
    after, before = adjoint[:, :, 1:].flatten(1, 2), states.permute(2, 0, 1, 3)[:, :, :-1]
    grad_u += _times(_apply(adjoint[:, :, 1:], write.mT), cut.out)
    grad_through = after.mT.to(through.dtype) @ _times(before, cut.through).flatten(1, 2).to(through.dtype)
    return (
        _by_step(grad_u, u.shape[1]),
        grad_taps[:, :chunk],
        sent_here.flatten(1, 2).mT @ after,
        read_here.flatten(1, 2).mT @ before.flatten(1, 2),
        grad_through.sum(0, keepdim=True) if len(through) < len(taps) else grad_through,
        adjoint[:, :, 0].transpose(0, 1),
    )


def _between(power: Tensor, written: Tensor, through: Tensor | None, initial: Tensor) -> Tensor:
    """Return X_0 = initial ``[d b n]`` and every X_{j+1} = M X_j + written_j: ``[d b j+1 n]``.

    What a chunk does not let through is zero.
    """
    if written.shape[2] == 0:
        return initial[:, :, None]
    carried = _apply(initial[:, :, None], power.mT.to(written.dtype))
    first = written[:, :, :1] + _times(carried, None if through is None else through[:, :1])
    rest = _odd_even(power, torch.cat([first, written[:, :, 1:]], 2), through)
    return torch.cat([initial[:, :, None], rest], 2)


def _odd_even(power: Tensor, b: Tensor, through: Tensor | None) -> Tensor:
    """Return the states from zero, of at least one chunk: neighbours are combined, and those between follow."""
    length = b.shape[2]
    if length == 1:
        return b
    matrix = power.mT.to(b.dtype)
    odd, even = (None, None) if through is None else (through[:, 1::2], through[:, 2::2])
    pairs = b[:, :, 1::2] + _times(_apply(b[:, :, : length - 1 : 2], matrix), odd)
    both = None if through is None or odd is None else odd * through[:, : length - 1 : 2]
    x = torch.empty_like(b)
    x[:, :, 1::2] = _odd_even(power @ power, pairs, both)
    x[:, :, 0] = b[:, :, 0]
    x[:, :, 2::2] = b[:, :, 2::2] + _times(_apply(x[:, :, 1 : length - 1 : 2], matrix), even)
    return x


class _Block(NamedTuple):
    """Steps that send to other steps, in blocks of one size.

    Attributes:
        size: Steps of a block.
        half: Where the receivers begin, and the senders end; 0 where every step is both.
        lags: How many steps each receiver is behind each sender, ``[senders receivers]``; c where it is none.
        alive: 1 for the steps of the sequence that is alive at the middle of the block, else 0, ``[b·blocks size]``.
    """

    size: int
    half: int
    lags: Tensor
    alive: Tensor | None

    def matrix(self, taps: Tensor) -> Tensor:
        """Return the taps as a matrix for each channel, from senders to receivers."""
        return pad(taps, (0, 1))[:, self.lags]

    def receivers(self, x: Tensor) -> Tensor:
        """Return a view of the receivers of ``[d b j c]``: ``[d blocks receivers]``."""
        return x.view(len(x), -1, self.size)[..., self.half :]

    def senders(self, x: Tensor, raw: bool = False) -> Tensor:
        """Return the senders; a view if ``raw``, else with zeros where they are not alive."""
        view = x.view(len(x), -1, self.size)[..., : self.half or self.size]
        return view if raw else self.masked_senders(view)

    def masked_senders(self, x: Tensor) -> Tensor:
        """Return zeros for senders that are not alive."""
        return x if self.alive is None else x * self.alive[:, : self.half]

    def masked(self, x: Tensor) -> Tensor:
        """Return zeros for receivers that are not alive."""
        return x if self.alive is None else x * self.alive[:, self.half :]


def _blocks(chunk: int, segment: Tensor | None, device: torch.device) -> Iterator[_Block]:
    """Yield the blocks that together apply all taps of a chunk."""
    step = torch.arange(chunk, device=device)
    if segment is None:
        lags = step - step[:, None]
        yield _Block(chunk, 0, torch.where(lags < 0, chunk, lags), None)
        return
    yield _Block(1, 0, step[:1, None], None)
    half = 1
    while half < chunk:
        ids = segment.reshape(-1, 2 * half)
        alive = ids == ids[:, half - 1 : half]
        yield _Block(2 * half, half, half + step[:half] - step[:half, None], alive)
        half *= 2
