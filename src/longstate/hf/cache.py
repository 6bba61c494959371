"""What a model has read, as ``generate`` of ``transformers`` wants to hold it: a state that can be gone back from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from .. import state as states
from .._shapes import Bool, Int, Shaped, Tensor

# Tokens that may be read once more after going back; what lies further back is read once and for all.
REREAD = 32


class Steps(NamedTuple):
    """Steps given to a model: token numbers ``[b t]`` or embedded ``[b t d]``, which count, and where one begins."""

    inputs: Shaped[Tensor, "b t ..."]
    valid: Bool[Tensor, "b t"] | None = None
    start: Bool[Tensor, "b t"] | None = None

    @property
    def length(self) -> int:
        """The number of steps."""
        return self.inputs.shape[1]

    def slice(self, begin: int, end: int) -> Steps:
        """Return the steps from ``begin`` to ``end`` (exclusive)."""
        masks = (None if x is None else x[:, begin:end] for x in (self.valid, self.start))
        return Steps(self.inputs[:, begin:end], *masks)

    def followed_by(self, others: Steps, embedding: torch.nn.Module) -> Steps:
        """Return these steps and others after them, embedded if either are."""
        inputs = [self.inputs, others.inputs]
        if inputs[0].ndim != inputs[1].ndim:
            inputs = [x if x.ndim == 3 else embedding(x) for x in inputs]
        valid = start = None
        if self.valid is not None or others.valid is not None:
            valid = torch.cat([steps._mask(steps.valid, True) for steps in (self, others)], 1)
        if self.start is not None or others.start is not None:
            start = torch.cat([steps._mask(steps.start, False) for steps in (self, others)], 1)
        return Steps(torch.cat(inputs, 1), valid, start)

    def _mask(self, given: Tensor | None, default: bool) -> Tensor:
        return torch.full(self.inputs.shape[:2], default, device=self.inputs.device) if given is None else given


class LongstateCache(Cache):
    """The state of a batch of sequences after what they have read.

    The holder changes as a model reads on; the tensors in it never do. So ``copy.copy(cache)`` is a second one that can
    be read on from independently, at no cost.

    To be cropped, it must know what was read: after ``activate_past_recording`` it keeps, beside the present state, an
    earlier one and the tokens since. Going back is taking the earlier state, and reading the tokens that stay together
    with those that come next.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._recording = False
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self._length, self._batch = 0, -1
        # The state after all steps, unless it has to be computed again: then from the earlier one and the steps since.
        self._state: Any = None
        self._stale = False
        self._earlier: Any = None
        self._since: Steps | None = None

    @property
    def state(self) -> Any:
        """The model's state, as ``LanguageModel`` returns it; None before anything is read.

        Raises:
            ValueError: If the cache was cropped and nothing has been read since.
        """
        if self._stale:
            raise ValueError(
                "LongstateCache.state: the cache was cropped, and the tokens that stay will be read again with the "
                "next ones. Ask for the state after the model has read on."
            )
        return self._state

    def read(self, model: Any, steps: Steps, keep: int) -> Shaped[Tensor, "b t d"]:
        """Read steps with a model's stack and return what it gives for the last ``steps.length`` of them.

        Args:
            model: What has a ``backbone``, and ``advance(steps, state)`` that runs it.
            steps: What to read.
            keep: How many of the last steps may be cropped later.
        """
        self._fit(steps.inputs.shape[0])
        new, state = steps.length, self._state
        if self._stale and self._since is not None:
            steps, state = self._since.followed_by(steps, model.backbone.embedding), self._earlier
        since = None if self._stale else self._since
        hidden = []
        if self._recording:
            settled = steps.length - max(keep, REREAD)
            if settled > 0:
                first, state = model.advance(steps.slice(0, settled), state)
                hidden.append(first)
                self._earlier, since, steps = state, None, steps.slice(settled, steps.length)
            self._since = steps if since is None else since.followed_by(steps, model.backbone.embedding)
        last, state = model.advance(steps, state)
        hidden.append(last)
        self._state, self._stale, self._length = state, False, self._length + new
        return torch.cat(hidden, 1)[:, -new:] if len(hidden) > 1 else last[:, last.shape[1] - new :]

    def _fit(self, batch: int) -> None:
        """Take the batch of the first call; later ones may have every sequence several times, as beams do."""
        if self._batch < 0:
            self._batch = batch
        if batch != self._batch:
            if batch % self._batch:
                raise ValueError(
                    f"LongstateCache: {batch} sequences came to a cache of {self._batch}. Give as many, or a multiple."
                )
            self.batch_repeat_interleave(batch // self._batch)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many steps have been read, those of padding included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return −1: there is no maximum."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether anything has been read."""
        return self._length > 0

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by ``−tokens_to_remove`` steps; a positive number is the length to go back to.

        Raises:
            ValueError: If what was read is not known so far back.
        """
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self._length - tokens_to_remove)
        known = 0 if self._since is None else self._since.length
        if drop > known:
            raise ValueError(
                f"LongstateCache.crop: asked to go back by {drop} steps, but {known} are kept. Call "
                f"activate_past_recording() before they are read."
            )
        if drop:
            self._length -= drop
            self._since = None if self._since is None or drop == known else self._since.slice(0, known - drop)
            self._stale = self._since is not None
            self._state = None if self._stale else self._earlier
        elif self._recording and not self._stale:
            self._earlier, self._since = self._state, None

    def activate_past_recording(self) -> None:
        """Keep from now on what is needed to go back."""
        if not self._recording:
            self._recording = True
            self._earlier, self._since = self._state, None

    @property
    def is_croppable(self) -> bool:
        """Whether what is read can be gone back from."""
        return self._recording

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self._length > 0

    @property
    def is_compileable(self) -> bool:
        """False: the state of full attention grows."""
        return False

    @property
    def batch_size(self) -> int:
        """The number of sequences; −1 before anything is read."""
        return self._batch

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        """Go on with the chosen sequences, in the chosen order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Shaped[Tensor, " n"]) -> None:
        """Go on with the chosen sequences, in the chosen order."""
        kept = states.select((self._state, self._earlier, self._since), indices)
        self._state, self._earlier, self._since = kept
        self._batch = int(indices.sum()) if indices.dtype is torch.bool else len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence ``repeats`` times, copies side by side."""
        if self._batch > 0:
            self.batch_select_indices(torch.arange(self._batch).repeat_interleave(repeats))
