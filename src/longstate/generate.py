"""Sampling from a language model: read a text once, keep what was read as a value, and write on from it.

``read`` takes tokens in, ``advance`` draws one token for each sequence, and ``generate`` does both for texts, with stop
strings. What lies between two calls is a ``Memory``: it can be saved, selected and joined like any state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import state as states
from ._shapes import Bool, Float, Int, Tensor
from .data.text import numbered_generator
from .data.tokenizers import Bytes, TextStream, Tokenizer, fits_model
from .models import LanguageModel
from .models.captured import CapturedStep
from .timeline import Timeline


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's logits; the filters apply in the order given here.

    Attributes:
        repetition_penalty: Divides the positive logits of tokens seen before, multiplies the negative ones; 1 is none.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keeps that many most likely tokens; 0 keeps all.
        top_p: Keeps the fewest most likely tokens that together have at least this probability; 1 keeps all.
        min_p: Keeps tokens at least this many times as likely as the most likely one; 0 keeps all.
        seed: Row i of a batch draws with ``seed + i``, so that each row can be drawn again alone.

    Raises:
        ValueError: If a value is out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("temperature", self.temperature >= 0, "0 or more (0 takes the most likely token)"),
            ("top_k", self.top_k >= 0, "0 or more (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}.")


class Memory(NamedTuple):
    """What a model has read and what is needed to go on exactly; a state, batch first.

    Attributes:
        state: The model's state after all tokens but the last.
        token: The last token, which the state has not taken in.
        seen: Which tokens have occurred, for the repetition penalty.
        drawn: How many tokens have been drawn, which is the place in the random numbers.
    """

    state: Any
    token: Int[Tensor, " b"]
    seen: Bool[Tensor, "b v"]
    drawn: Int[Tensor, " b"]


class Step(NamedTuple):
    """One step of generation.

    Attributes:
        text: What each row shows now; "" where a character or a stop string may be unfinished, or the row is done.
        memory: What has been read and written up to here; ``memory.token`` is what was drawn.
    """

    text: list[str]
    memory: Memory


def penalise_repetition(
    logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: float
) -> Float[Tensor, "b v"]:
    """Make tokens seen before less likely: l/p where l > 0, l·p elsewhere (Keskar et al., arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Tensor, "b v"], k: int) -> Float[Tensor, "b v"]:
    """Set all but the k largest logits to -∞; ties with the k-th stay."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b v"]:
    """Keep the fewest most likely tokens that have at least probability p (Holtzman et al., arXiv:1904.09751)."""
    ordered, order = logits.sort(descending=True, stable=True)
    probability = ordered.softmax(-1)
    # A token stays if those before it do not reach p: the first always does.
    dropped = probability.cumsum(-1) - probability >= p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b v"]:
    """Keep tokens with at least p times the largest probability (Nguyen et al., arXiv:2407.01082)."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.amax(-1, keepdim=True), -torch.inf)


def draw(
    logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], drawn: Int[Tensor, " b"], sampling: Sampling
) -> Int[Tensor, " b"]:
    """Draw one token for each row; which one depends on the row's logits and its own random number alone."""
    # On the CPU in float64, so that the same logits give the same token on every device.
    logits = penalise_repetition(logits.double().cpu(), seen.cpu(), sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1).to(seen.device)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    below = logits.softmax(-1).cumsum(-1)
    numbers = [numbered_generator(sampling.seed + row, n).random() for row, n in enumerate(drawn.tolist())]
    sought = torch.tensor(numbers, dtype=torch.float64)[:, None] * below[:, -1:]
    # The first token whose cumulative probability exceeds the number: never one of probability zero.
    return torch.searchsorted(below, sought, right=True).clamp(max=below.shape[-1] - 1)[:, 0].to(seen.device)


@torch.no_grad()
def read(
    model: LanguageModel, prompts: Sequence[Sequence[int] | Any], memory: Memory | None = None, chunk: int = 1024
) -> Memory:
    """Take in tokens, for a batch of prompts of any lengths; shorter ones are padded on the left, which is exact.

    Args:
        model: The model.
        prompts: For each row its tokens.
        memory: What was read before. A single memory serves many prompts; with a memory a prompt may be empty.
        chunk: Tokens taken in at a time, which bounds the memory that a long text needs.

    Raises:
        ValueError: If there is nothing to read, there are not as many memories as prompts, or a layer has no state.
    """
    for i, state in enumerate(model.initial_state(1)):
        if state is None:
            raise ValueError(
                f"layers[{i}] ({model.config['layers'][i]!r:.80}) has no state, so that there is nothing to go on"
                " from, token by token. Take layers that have one."
            )
    if not len(prompts):
        raise ValueError("there is no prompt. Give at least one.")
    device = next(model.parameters()).device
    if memory is None:
        zeros = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool, device=device)
        state, drawn, rows = None, zeros, [torch.as_tensor(prompt) for prompt in prompts]
    else:
        if len(memory.token) == 1:
            memory = states.select(memory, [0] * len(prompts))
        if len(memory.token) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came for {len(memory.token)} sequences read before. "
                f"Give as many prompts as sequences, or the memory of one sequence for all."
            )
        state, seen, drawn = memory.state, memory.seen, memory.drawn
        rows = [
            torch.cat([token[None].cpu(), torch.as_tensor(prompt)])
            for token, prompt in zip(memory.token, prompts, strict=True)
        ]
    if not all(map(len, rows)):
        raise ValueError("a prompt is empty, and nothing was read before it. Give at least one character.")

    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = row
        valid[i, longest - len(row) :] = True
    tokens, valid = tokens.to(device), valid.to(device)
    # All but the last: it is what the next token is drawn from.
    for begin in range(0, longest - 1, chunk):
        end = min(begin + chunk, longest - 1)
        # Not through the head: nobody looks at the logits of what is only read.
        _, state = model.backbone(tokens[:, begin:end], state, _counting(valid[:, begin:end]))
    occurs = torch.zeros_like(seen, dtype=torch.int64).scatter_add_(1, tokens, valid.long())
    return Memory(model.initial_state(len(rows)) if state is None else state, tokens[:, -1], seen | (occurs > 0), drawn)


def _counting(valid: Bool[Tensor, "b t"]) -> Timeline | None:
    """Return the timeline of padded steps; none where all count, which is quicker and the same."""
    return None if valid.all() else Timeline(valid=valid)


@torch.no_grad()
def advance(
    model: LanguageModel,
    memory: Memory,
    sampling: Sampling,
    active: Bool[Tensor, " b"] | None = None,
    vocab_size: int | None = None,
    step: CapturedStep | None = None,
) -> Memory:
    """Draw one token for each active row, of the first ``vocab_size`` if given; the others stay as they are.

    Args:
        model: The model.
        memory: What was read and drawn before.
        sampling: How the token is drawn.
        active: Which rows go on; all when absent.
        vocab_size: How many tokens there are; as many as the model has logits when absent.
        step: The model's step as a CUDA graph, for as many sequences, through which the last token is taken.

    Raises:
        ValueError: If the step is that of another model, or of another number of sequences.
    """
    if active is None:
        active = torch.ones_like(memory.token, dtype=torch.bool)
    if step is None:
        logits, state = model(memory.token[:, None], memory.state, _counting(active[:, None]))
    else:
        if step.model is not model:
            raise ValueError("the captured step is that of another model. Make one of this model.")
        step.load(memory.state)
        logits, state = step(memory.token)[:, None], step.state
        if not active.all():
            state = states.where(active, state, memory.state)
    # The embedding may have more rows than there are tokens, and the model's vocabulary more than the tokenizer's.
    count = model.vocab_size if vocab_size is None else min(vocab_size, model.vocab_size)
    token = draw(logits[:, -1, :count], memory.seen[:, :count], memory.drawn, sampling)
    token = torch.where(active, token, memory.token)
    return Memory(state, token, memory.seen.scatter(1, token[:, None], True), memory.drawn + active)


class _Writer:
    """Turns the tokens of one row into text, and ends the row before a stop string or token."""

    def __init__(self, stream: TextStream, stop: Sequence[str], stop_tokens: Sequence[int] = ()) -> None:
        self.done = False
        self._stream, self._stop, self._held, self._stop_tokens = stream, stop, "", frozenset(stop_tokens)

    def push(self, token: int, last: bool) -> str:
        if self.done:
            return ""
        if token in self._stop_tokens:
            self.done = True
            return self._held + self._stream.finish()
        self._held += self._stream.push(token) + (self._stream.finish() if last else "")
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.done = True
            return self._held[: min(found)]
        # The end may be the beginning of a stop string: it is shown once it turns out not to be.
        held = 0 if last else max((_overlap(self._held, text) for text in self._stop), default=0)
        shown = self._held[: len(self._held) - held]
        self._held = self._held[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def generate(
    model: LanguageModel,
    prompts: Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    sampling: Sampling | None = None,
    max_tokens: int = 200,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    memory: Memory | None = None,
    chunk: int = 1024,
    step: CapturedStep | None = None,
) -> Iterator[Step]:
    """Write on from a batch of prompts, step by step.

    A row ends before a stop string or token; its memory then stays as it was when that was complete.

    Args:
        model: The model, in eval mode if it has one.
        prompts: Texts to read first; without them, generation goes on from the memory. Where there is no memory, they
            begin as the tokenizer has texts begin.
        tokenizer: The model's tokenizer; bytes if none is given. Tokens that it does not know are never drawn.
        sampling: How tokens are drawn; from the model's own probabilities if not given.
        max_tokens: The most tokens to draw for each row.
        stop: Texts that end a row.
        stop_tokens: Tokens that end a row.
        memory: What was read before (of all rows, or of one for all).
        chunk: Tokens read at a time.
        step: ``CapturedStep(model, rows)``: on a GPU tokens take less time through it; it can serve many calls.

    Returns:
        An iterator of one ``Step`` for each token; the prompts have been read when it is returned.

    Raises:
        ValueError: If the tokenizer is not the model's, a stop string is empty, there is nothing to go on from, or the
            step is that of another model or number of sequences.
    """
    tokenizer, sampling = tokenizer or Bytes(), sampling or Sampling()
    if not fits_model(tokenizer, model.vocab_size):
        raise ValueError(
            f"generate: the tokenizer has a vocabulary of {tokenizer.vocab_size}, the model of {model.vocab_size}. "
            f"Give the tokenizer that the model was trained with."
        )
    if not all(stop):
        raise ValueError("generate: a stop string is empty, which would end every text at once. Leave it out.")
    if prompts is not None:
        memory = read(model, prompt_tokens(tokenizer, prompts, begin=memory is None), memory, chunk)
    if memory is None:
        raise ValueError("generate: neither prompts nor a memory came. Give at least one of them.")
    writers = [_Writer(tokenizer.stream(), stop, stop_tokens) for _ in memory.token]
    return _steps(model, memory, sampling, max_tokens, tokenizer.vocab_size, writers, step)


def prompt_tokens(tokenizer: Tokenizer, prompts: Sequence[str], begin: bool = True) -> list[list[int]]:
    """Return the tokens of prompts, each as the beginning of a sequence if wanted."""
    return [[*(tokenizer.beginning if begin else ()), *tokenizer.encode(text).tolist()] for text in prompts]


def _steps(
    model: LanguageModel,
    memory: Memory,
    sampling: Sampling,
    max_tokens: int,
    vocab_size: int,
    writers: Sequence[_Writer],
    step: CapturedStep | None,
) -> Iterator[Step]:
    for count in range(1, max_tokens + 1):
        active = torch.tensor([not writer.done for writer in writers], device=memory.token.device)
        if not active.any():
            return
        memory = advance(model, memory, sampling, active, vocab_size, step)
        text = [w.push(token, count == max_tokens) for w, token in zip(writers, memory.token.tolist(), strict=True)]
        yield Step(text, memory)


def fingerprint(model: LanguageModel) -> str:
    """Return what tells this model from every other: a SHA-256 of its configuration and weights."""
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_memory(memory: Memory, model: LanguageModel, path: str | os.PathLike[str]) -> None:
    """Write what was read as a safetensors file that says which model it belongs to."""
    states.save(memory, path, {"memory_of": fingerprint(model)})


def load_memory(model: LanguageModel, path: str | os.PathLike[str]) -> Memory:
    """Read what ``save_memory`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or belongs to another model.
    """
    if states.load_metadata(path).get("memory_of") != fingerprint(model):
        raise ValueError(
            f"{path}: this was read by another model. Use the model that wrote it, or read the text again."
        )
    device = next(model.parameters()).device
    count = torch.zeros(1, dtype=torch.int64, device=device)
    seen = torch.zeros(1, model.vocab_size, dtype=torch.bool, device=device)
    return states.load(path, Memory(model.initial_state(1), count, seen, count))
