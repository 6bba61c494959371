"""Fixed linear systems with a dense matrix: one for each channel."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Bool, Float, Tensor
from ...timeline import Compaction, Timeline, segments, zero_where_invalid
from .._register import at_least_float32, call, choose, define, expect, register, without_autocast
from . import chunked, reference


def state_space(
    u: Float[Tensor, "b t d"],
    A: Float[Tensor, "_ n n"],
    B: Float[Tensor, "d n"],
    C: Float[Tensor, "d n"],
    initial: Float[Tensor, "b d n"] | None = None,
    *,
    start: Bool[Tensor, "b t"] | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Run one fixed linear system for each channel, with any matrix.

        x_t = A x_{t−1} + B u_t,    y_t = C · x_t

    Powers of A are taken once, in double precision: log₂ c products of matrices for chunks of c steps, and one for each
    doubling of the number of chunks. A step then costs c + 2n + 2n²/c products.

    Args:
        u: Inputs.
        A: One matrix for each channel ``[d n n]``, or one for all ``[1 n n]``.
        B: Input vectors.
        C: Output vectors.
        initial: x_0; zero when absent.
        start: Where the state is set to zero before the step.
        valid: Where the step counts; elsewhere the state passes unchanged and the output is zero.
        backend: A backend by name (``ops.backends()``); the best there is when absent.

    Returns:
        Outputs in the type of ``u``, and the final state in float32 at least.

    Raises:
        ValueError: If shapes do not go together or the backend does not exist.

    Source:
        Gu et al., "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
        NeurIPS 2021.
    """
    (batch, length, width), states = u.shape, B.shape[-1]
    expect("state_space", "A", A, (width, states, states), (1, states, states))
    expect("state_space", "B", B, (width, states))
    expect("state_space", "C", C, (width, states))
    if initial is not None:
        expect("state_space", "initial", initial, (batch, width, states))
    if start is not None or valid is not None:
        _, start, valid = Timeline(None, start, valid).expand(batch, length)
    backend = choose("state_space", backend)
    dtype = at_least_float32(u, A, B, C) if initial is None else at_least_float32(u, A, B, C, initial)
    x_0 = u.new_zeros(batch, width, states, dtype=dtype) if initial is None else initial.to(dtype)
    given = (zero_where_invalid(u, valid).to(dtype), A.to(dtype), B.to(dtype), C.to(dtype), x_0)
    with without_autocast(u):
        # A step or none takes no powers. An exported graph takes any length.
        if backend == "reference" or (not torch.compiler.is_exporting() and length <= 1):
            y, final = reference.state_space(*given, start, valid)
        else:
            y, final = _in_chunks(*given, start, valid, backend)
    return y.to(u.dtype), final


def _in_chunks(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    start: Tensor | None,
    valid: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Bring the steps that count together, run, and take the state after the last of them."""
    length, chunk = u.shape[1], chunked.CHUNK
    if not torch.compiler.is_compiling():  # a traced graph takes any length, so it has chunks of one size
        chunk = min(chunk, 1 << (length - 1).bit_length())
    count, compaction = torch.full_like(u[:, 0, 0], length, dtype=torch.int64), None
    if valid is not None:
        compaction = Compaction.of(valid)
        u, count = compaction.compact(u), compaction.total
        start = None if start is None else compaction.start(start)
    powers = chunked.powers(A, B, C, chunk)
    y, states = call(
        "state_space", u, powers.taps, powers.write, powers.read, powers.through, initial, start, backend=backend
    )
    final = _state_after(count, u, powers, states, start)
    return y if compaction is None else compaction.restore(y), final


def _state_after(count: Tensor, u: Tensor, powers: chunked.Powers, states: Tensor, start: Tensor | None) -> Tensor:
    """Return the state after so many steps of each row ``[b d n]``, from the one before the chunk they end in."""
    chunk = powers.taps.shape[1]
    whole, rest = count // chunk, count % chunk
    x = states.gather(1, whole.view(-1, 1, 1, 1).expand(-1, 1, *states.shape[2:]))[:, 0]
    # The last steps, the newest last; before them, where the chunk began later, what does not count.
    age = torch.arange(chunk - 1, -1, -1, device=u.device)
    at = (count[:, None] - 1 - age).clamp(min=0)
    here = age < rest[:, None]
    if start is not None:
        # A start behind the last step that counts leaves nothing.
        segment = segments(start)
        here = here & (segment.gather(1, at) == segment[:, -1:])
        before = torch.cat([torch.zeros_like(segment[:, :1]), segment], 1).gather(1, whole[:, None] * chunk)
        x = x.masked_fill((before != segment[:, -1:])[..., None], 0)
    for bit, power in enumerate(powers.doublings):
        further = (power @ x.movedim(0, -1)).movedim(-1, 0)
        x = torch.where(((rest >> bit) & 1 == 1)[:, None, None], further, x)
    window = u.gather(1, at[..., None].expand(-1, -1, u.shape[2])).masked_fill(~here[..., None], 0)
    return x + (window.movedim(2, 0) @ powers.write).movedim(0, 1)


def _fake(
    u: Tensor, taps: Tensor, write: Tensor, read: Tensor, through: Tensor, initial: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, width, states = initial.shape
    chunks = (u.shape[1] + taps.shape[1] - 1) // taps.shape[1]
    return torch.empty_like(u), u.new_empty(batch, chunks + 1, width, states)


def _fake_backward(
    grad: Tensor,
    grad_states: Tensor,
    u: Tensor,
    taps: Tensor,
    write: Tensor,
    read: Tensor,
    through: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return *(torch.empty_like(x) for x in (u, taps, write, read, through)), torch.empty_like(grad_states[:, 0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, taps, write, read, through, _, start, ctx.backend = inputs
    ctx.save_for_backward(u, taps, write, read, through, start, output[1])


def _backward(ctx: Any, grad: Tensor, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(grad):
        gradients = torch.ops.longstate.state_space_backward(grad, grad_states, *ctx.saved_tensors, ctx.backend)
    return (*gradients, None, None)


register(
    "state_space",
    "Tensor u, Tensor taps, Tensor write, Tensor read, Tensor through, Tensor initial, Tensor? start"
    " -> (Tensor, Tensor)",
    forward={"chunked": chunked.state_space},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "state_space_backward",
    "Tensor grad, Tensor grad_states, Tensor u, Tensor taps, Tensor write, Tensor read, Tensor through, Tensor? start,"
    " Tensor states -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"chunked": chunked.state_space_backward},
    _fake_backward,
)
