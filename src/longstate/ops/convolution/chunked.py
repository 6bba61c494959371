"""Causal depthwise convolution in few passes over whole tensors."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import conv2d, pad

from ..._shapes import Tensor

DIRECT = 64  # below so many taps, products beat transforms
FEW = 8  # up to so many steps, one product each beats transforms
AT_ONCE = 1 << 26  # numbers that are transformed at once, so that what stands beside inputs and outputs is bounded


def short(padded: Tensor, taps: Tensor, segment: Tensor | None) -> Tensor:
    """Return the convolution by one multiply-add for each tap, or by the depthwise convolution of the machine's
    library."""
    before = taps.shape[1] - 1
    length = padded.shape[1] - before
    if length > FEW and _library_is_good(padded, segment):
        return conv2d(_image(padded), _filter(taps), groups=taps.shape[0]).squeeze(2).transpose(1, 2)
    rows = taps.T.contiguous()
    y = rows[0] * padded[:, before:]
    for i in range(1, before + 1):
        y.addcmul_(rows[i], _shifted(padded, segment, i, before, length))
    return y


def short_backward(grad: Tensor, padded: Tensor, taps: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``padded`` and ``taps``."""
    before = taps.shape[1] - 1
    length = grad.shape[1]
    fast = length > 0 and _library_is_good(padded, segment)
    rows, grad_rows = taps.T.contiguous(), torch.empty_like(taps.T)
    grad_padded = torch.zeros(0) if fast else torch.zeros_like(padded)
    for i in range(before + 1):
        grad_rows[i] = (grad * _shifted(padded, segment, i, before, length)).sum((0, 1))
        if not fast:
            term = grad if segment is None else grad * _same(segment, i, before, length)
            grad_padded[:, before - i : before - i + length].addcmul_(term, rows[i])
    if fast:
        image, kernel = _image(padded), _filter(taps)
        options = ([1, 1], [0, 0], [1, 1], False, [0, 0], taps.shape[0], [True, False, False])
        grad_image = torch.ops.aten.convolution_backward(_image(grad), image, kernel, None, *options)[0]
        grad_padded = grad_image.squeeze(2).transpose(1, 2)
    return grad_padded, grad_rows.T


def _library_is_good(padded: Tensor, segment: Tensor | None) -> bool:
    """Whether torch's own convolution serves: on the CPU (a GPU's may round to TF32), and not in double precision, for
    which it has no fast way there; it refuses what is empty."""
    return segment is None and padded.device.type == "cpu" and padded.dtype != torch.float64 and padded.numel() > 0


def _image(x: Tensor) -> Tensor:
    """Return ``[b t d]`` as an image one pixel high; in memory, channels last, it is what it was."""
    return x.transpose(1, 2).unsqueeze(2)


def _filter(taps: Tensor) -> Tensor:
    return taps.flip(1)[:, None, None]


def _shifted(padded: Tensor, segment: Tensor | None, i: int, before: int, length: int) -> Tensor:
    """Return u_{t−i}, with zeros where that is another sequence."""
    u = padded[:, before - i : before - i + length]
    return u if segment is None else u * _same(segment, i, before, length)


def _same(segment: Tensor, i: int, before: int, length: int) -> Tensor:
    return (segment[:, before - i : before - i + length] == segment[:, before:])[..., None]


def fft(u: Tensor, taps: Tensor, length: int) -> Tensor:
    """Return the first ``length`` steps of the causal convolution of ``u [… t d]`` with ``taps [d l]``, by real
    transforms.

    Twice the length keeps the circular convolution from wrapping around.
    """
    taps = taps[:, :length]
    size = good_size(max(u.shape[-2] + taps.shape[1] - 1, length))
    spectrum = torch.fft.rfft(taps, n=size).transpose(0, 1)
    return torch.fft.irfft(torch.fft.rfft(u, n=size, dim=-2) * spectrum, n=size, dim=-2)[..., :length, :]


def good_size(least: int) -> int:
    """Return the smallest 2^i or 3·2^i that is enough: transforms of such sizes are fast everywhere."""
    power = 1 << (least - 1).bit_length() if least > 1 else 1
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= least else power


def long(padded: Tensor, taps: Tensor, segment: Tensor | None) -> Tensor:
    """Return the convolution by transforms, in O(t log t), or O(t log² t) with segments."""
    before = taps.shape[1] - 1
    length = padded.shape[1] - before
    if before < DIRECT:
        return short(padded, taps, segment)
    if length > FEW:
        if segment is not None:
            return _within_segments(padded, taps, segment)[:, before:]
        return _together([_in_blocks(padded[..., at], taps[at]) for at in _channels(padded)], -1)
    outputs = []
    for t in range(length):
        window = padded[:, t : t + before + 1]
        if segment is not None:
            window = window * (segment[:, t : t + before + 1] == segment[:, t + before, None])[..., None]
        outputs.append((window * taps.flip(1).T).sum(1))
    return torch.stack(outputs, 1) if outputs else torch.empty_like(padded[:, :0])


def long_backward(grad: Tensor, padded: Tensor, taps: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``padded`` and ``taps``.

    That of the input is the same convolution backwards in time; that of the taps is a correlation of grad and input.
    """
    before = taps.shape[1] - 1
    if before < DIRECT:
        return short_backward(grad, padded, taps, segment)
    if segment is None:
        parts = [_in_blocks_backward(grad[..., at], padded[..., at], taps[at]) for at in _channels(padded)]
        return _together([part[0] for part in parts], -1), _together([part[1] for part in parts], 0)
    grad = pad(grad, (0, 0, before, 0))
    grad_padded = _within_segments(grad.flip(1), taps, segment.flip(1)).flip(1)
    return grad_padded, _correlate_within_segments(grad, padded, segment, taps.shape[1])


def _channels(padded: Tensor) -> list[slice]:
    """Return the channels in groups that are transformed at once."""
    batch, length, width = padded.shape
    group = max(1, AT_ONCE // max(1, batch * length))
    return [slice(i, i + group) for i in range(0, max(1, width), group)]


def _together(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _in_blocks(padded: Tensor, taps: Tensor) -> Tensor:
    """Return the convolution by transforms of blocks that overlap by what came before (overlap-save).

    A circular convolution is wrong in its first l − 1 steps only, and those belong to the block before.
    """
    before, (size, hop) = taps.shape[1] - 1, _block(padded, taps)
    spectrum = torch.fft.rfft(taps, n=size)[:, None]
    y = torch.fft.irfft(_transformed(padded, size, hop).mul_(spectrum), n=size)[..., before:]
    return _turned(y.flatten(2)[..., : padded.shape[1] - before])


def _in_blocks_backward(grad: Tensor, padded: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``padded`` and ``taps``: correlations, of which with l − 1 zeros before each block of
    ``grad`` none wraps around."""
    before, (size, hop) = taps.shape[1] - 1, _block(padded, taps)
    spectrum = torch.fft.rfft(taps, n=size)[:, None]
    blocks = max(1, -(-grad.shape[1] // hop))
    g = pad(_turned(grad), (0, blocks * hop - grad.shape[1])).unflatten(2, (blocks, hop))
    g = torch.fft.rfft(pad(g, (before, 0)), n=size)
    of_taps = _transformed(padded, size, hop).conj_physical_().mul_(g).sum((0, 2))
    grad_taps = torch.fft.irfft(of_taps, n=size)[:, : before + 1]
    sent = torch.fft.irfft(g.mul_(spectrum.conj()), n=size)
    if blocks == 1:
        return _turned(sent[:, :, 0, : padded.shape[1]]), grad_taps
    total = pad(sent[..., :hop], (0, 0, 0, 1))  # hop ≥ l − 1: a block reaches into the next one, no further
    total[:, :, 1:, :before] += sent[..., hop:]
    return _turned(total.flatten(2)[..., : padded.shape[1]]), grad_taps


def _block(padded: Tensor, taps: Tensor) -> tuple[int, int]:
    """Return the size of the blocks that cost least, and how many steps of it are new in each."""
    before = taps.shape[1] - 1
    steps = padded.shape[1] - before

    def cost(size: int) -> float:
        return -(-steps // (size - before)) * size * math.log2(size)

    whole = good_size(padded.shape[1])
    size = good_size(2 * before + 1)
    sizes = [whole]
    while size < whole:
        sizes.append(size)
        size = good_size(size + 1)
    size = min(sizes, key=cost)
    return size, size - before


def _transformed(padded: Tensor, size: int, hop: int) -> Tensor:
    """Return the spectra of blocks ``[b d j f]``."""
    x = _turned(padded)
    blocks = max(1, -(-(x.shape[2] - size + hop) // hop))
    if blocks == 1:
        return torch.fft.rfft(x, n=size)[:, :, None]
    return torch.fft.rfft(pad(x, (0, (blocks - 1) * hop + size - x.shape[2])).unfold(2, size, hop))


def _turned(x: Tensor) -> Tensor:
    """Return ``[b m n]`` as ``[b n m]``, matrix by matrix: torch copies one in a quarter of the time on the CPU."""
    turned = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for matrix, target in zip(x, turned, strict=True):
        target.copy_(matrix.contiguous().T)
    return turned


def _within_segments(u: Tensor, taps: Tensor, segment: Tensor) -> Tensor:
    """Return the convolution in which no segment sees another, by halving.

    In a block, what its left half sends to its right half belongs to the one segment that is alive at its middle. So
    each block needs one masked transform, and each step lies in log₂ t blocks.
    """
    batch, given, width = u.shape
    length = max(DIRECT, 1 << (given - 1).bit_length())
    u = pad(u, (0, 0, 0, length - given))
    segment = pad(segment, (0, length - given), value=-1)
    # Blocks of the smallest size, directly: each is a [c c] matrix for each channel, never for each step and channel.
    size = DIRECT // 2
    blocks, ids = u.view(batch, -1, size, width), segment.view(batch, -1, size)
    y = taps[:, 0] * blocks
    for i in range(1, min(size, taps.shape[1])):
        same = (ids[:, :, i:] == ids[:, :, :-i])[..., None]
        y[:, :, i:] += taps[:, i] * (blocks[:, :, :-i] * same)
    y = y.view(batch, length, width)
    while size < length:
        blocks, ids = u.view(batch, -1, 2 * size, width), segment.view(batch, -1, 2 * size)
        alive = (ids == ids[:, :, size - 1 : size])[..., None]
        sent = fft(blocks[:, :, :size] * alive[:, :, :size], taps, 2 * size)[:, :, size:] * alive[:, :, size:]
        y.view(batch, -1, 2 * size, width)[:, :, size:] += sent
        size *= 2
    return y[:, :given]


def _correlate_within_segments(grad: Tensor, u: Tensor, segment: Tensor, taps: int) -> Tensor:
    """Return the correlation in which no segment sees another, by the halving of ``_within_segments``."""
    batch, given, width = u.shape
    length = max(DIRECT, 1 << (given - 1).bit_length())
    u, g = (pad(x, (0, 0, 0, length - given)) for x in (u, grad))
    segment = pad(segment, (0, length - given), value=-1)
    total = g.new_zeros(width, length + 1)
    size = DIRECT // 2
    g_blocks, blocks, ids = (
        g.view(batch, -1, size, width),
        u.view(batch, -1, size, width),
        segment.view(batch, -1, size),
    )
    total[:, 0] = (g_blocks * blocks).sum((0, 1, 2))
    for i in range(1, size):
        same = (ids[:, :, i:] == ids[:, :, :-i])[..., None]
        total[:, i] = (g_blocks[:, :, i:] * blocks[:, :, :-i] * same).sum((0, 1, 2))
    while size < length:
        shape = (batch, -1, 2 * size, width)
        g_blocks, blocks, ids = g.view(shape), u.view(shape), segment.view(batch, -1, 2 * size)
        alive = (ids == ids[:, :, size - 1 : size])[..., None]
        sent, received = blocks[:, :, :size] * alive[:, :, :size], g_blocks[:, :, size:] * alive[:, :, size:]
        spectrum = torch.fft.rfft(received, n=2 * size, dim=2) * torch.fft.rfft(sent, n=2 * size, dim=2).conj()
        # Received steps are `size` later than the sent ones they stand beside: lags 1 … 2·size − 1, none wraps onto
        # another.
        lags = torch.fft.irfft(spectrum.sum((0, 1)), n=2 * size, dim=0).roll(size, 0)
        total[:, 1 : 2 * size] += lags[1:].transpose(0, 1)
        size *= 2
    return pad(total, (0, max(0, taps - total.shape[1])))[:, :taps]
