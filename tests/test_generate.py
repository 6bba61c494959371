"""Sampling: each filter against a case by hand, and equal texts however they are computed."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longstate import state as states
from longstate.data.tokenizers import Bytes
from longstate.generate import (
    Memory,
    Sampling,
    advance,
    draw,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    load_memory,
    penalise_repetition,
    read,
    save_memory,
)
from longstate.models import LanguageModel
from longstate.models.captured import CapturedStep

INF = math.inf
# Probabilities 0.5, 0.25, 0.15, 0.1 in another order.
LOGITS = torch.tensor([[0.15, 0.5, 0.1, 0.25]], dtype=torch.float64).log()
PROMPTS = ["def f(", "a", "class Longer than the others:"]
HYBRID = [
    {"mixer": "mamba2", "d_state": 8, "head_dim": 8},
    {"mixer": "attention", "n_heads": 2, "window": 4},
    {"mixer": None, "mlp": {"hidden": 16}},
    {"mixer": "s5", "d_state": 8},
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LanguageModel(256, 16, HYBRID, pad_vocab_size_multiple=64).eval()
        # Sharper than a new model is, so that what was read matters for what is drawn.
        model.lm_head.weight.data *= 40
    return model


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().flatten().tolist()


def written(model: LanguageModel, prompts: Sequence[str] | None, sampling: Sampling, **options: object) -> list[str]:
    steps = list(generate(model, prompts, sampling=sampling, **options))
    return ["".join(pieces) for pieces in zip(*(step.text for step in steps), strict=True)]


def test_top_k_keeps_the_largest() -> None:
    assert kept(keep_top_k(LOGITS, 1)) == [1]
    assert kept(keep_top_k(LOGITS, 2)) == [1, 3]
    assert kept(keep_top_k(LOGITS, 9)) == [0, 1, 2, 3]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert kept(keep_top_p(LOGITS, 0.4)) == [1]
    assert kept(keep_top_p(LOGITS, 0.6)) == [1, 3]
    assert kept(keep_top_p(LOGITS, 0.76)) == [0, 1, 3]
    assert kept(keep_top_p(LOGITS, 0.001)) == [1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(keep_min_p(LOGITS, 0.49)) == [1, 3]
    assert kept(keep_min_p(LOGITS, 0.25)) == [0, 1, 3]
    assert kept(keep_min_p(LOGITS, 1.0)) == [1]


def test_the_repetition_penalty_makes_seen_tokens_less_likely_on_either_side_of_zero() -> None:
    seen = torch.tensor([[True, True, False, False]])
    logits = penalise_repetition(torch.tensor([[2.0, -2.0, 2.0, -2.0]]), seen, 2.0)
    assert logits.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    n = 1500
    seen, drawn = torch.zeros(1, 4, dtype=torch.bool), torch.arange(n)
    for sampling, wanted in (
        (Sampling(), [0.15, 0.5, 0.1, 0.25]),
        (Sampling(temperature=0.5), [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),
        (Sampling(top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(min_p=1.0), [0, 1, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ):
        tokens = torch.cat([draw(LOGITS, seen, i[None], sampling) for i in drawn])
        share = tokens.bincount(minlength=4) / n
        # Four standard deviations of a share of one half.
        assert share.tolist() == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / n))


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.49, 1), (0.5, 3), (math.nextafter(1.0, 0.0), 3)])
def test_a_token_of_probability_zero_is_never_drawn(monkeypatch: pytest.MonkeyPatch, number: float, token: int) -> None:
    module = sys.modules["longstate.generate"]  # the package gives the name to the function
    monkeypatch.setattr(module, "numbered_generator", lambda *_: SimpleNamespace(random=lambda: number))
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
    assert draw(logits, torch.zeros(1, 5, dtype=torch.bool), torch.tensor([0]), Sampling()).tolist() == [token]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_p=0.9, repetition_penalty=1.3)])
def test_a_batch_of_prompts_is_each_prompt_alone(model: LanguageModel, sampling: Sampling) -> None:
    together = written(model, PROMPTS, sampling, max_tokens=30)
    for i, prompt in enumerate(PROMPTS):
        # Row i of a batch draws with seed + i.
        alone = Sampling(**{**vars(sampling), "seed": sampling.seed + i})
        assert written(model, [prompt], alone, max_tokens=30) == [together[i]]
    assert len(set(together)) == 3


def test_the_same_seed_gives_the_same_text_and_another_another(model: LanguageModel) -> None:
    assert written(model, ["a"], Sampling(seed=5), max_tokens=25) == written(
        model, ["a"], Sampling(seed=5), max_tokens=25
    )
    assert written(model, ["a"], Sampling(seed=5), max_tokens=25) != written(
        model, ["a"], Sampling(seed=6), max_tokens=25
    )
    first, second = written(model, ["a", "a"], Sampling(), max_tokens=25)
    assert first != second, "rows with the same prompt draw different tokens"


def test_pieces_of_any_length_give_the_same_memory(model: LanguageModel) -> None:
    tokens = [Bytes().encode(text) for text in PROMPTS]
    whole = read(model, tokens)
    for chunk in (1, 7):
        pieces = read(model, tokens, chunk=chunk)
        for a, b in zip(whole.state, pieces.state, strict=True):
            assert all(map(lambda x, y: torch.allclose(x, y, atol=1e-5), a, b))
        assert torch.equal(whole.token, pieces.token)
        assert torch.equal(whole.seen, pieces.seen)
    for row, text in zip(whole.seen, PROMPTS, strict=True):
        assert row.nonzero().flatten().tolist() == sorted(set(text.encode())), "padding is not seen"


def test_reading_in_two_parts_is_reading_at_once(model: LanguageModel) -> None:
    begun = read(model, [Bytes().encode("def ")])
    both = read(model, [Bytes().encode("f("), Bytes().encode("")], begun)
    sampling = Sampling(repetition_penalty=1.2)
    assert written(model, None, sampling, memory=both, max_tokens=20) == written(
        model, ["def f(", "def "], sampling, max_tokens=20
    )


@pytest.mark.parametrize("at", [1, 10])
def test_a_saved_memory_goes_on_as_if_nothing_had_happened(model: LanguageModel, tmp_path: Path, at: int) -> None:
    sampling = Sampling(repetition_penalty=1.5, top_k=50)
    steps = list(generate(model, PROMPTS, sampling=sampling, max_tokens=at))
    save_memory(steps[-1].memory, model, tmp_path / "memory.safetensors")
    memory = load_memory(model, tmp_path / "memory.safetensors")
    rest = [step.memory.token for step in generate(model, memory=memory, sampling=sampling, max_tokens=20)]
    whole = [step.memory.token for step in generate(model, PROMPTS, sampling=sampling, max_tokens=at + 20)]
    assert torch.equal(torch.stack(rest), torch.stack(whole[at:]))


def test_a_memory_of_another_model_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    save_memory(read(model, [[1, 2]]), model, tmp_path / "memory.safetensors")
    other = LanguageModel(256, 16, HYBRID)
    with pytest.raises(ValueError, match="read by another model"):
        load_memory(other, tmp_path / "memory.safetensors")


def test_a_row_ends_before_a_stop_string_and_its_memory_stays(model: LanguageModel) -> None:
    whole = written(model, PROMPTS, Sampling(), max_tokens=40)
    stop = whole[1][20:22]
    end = whole[1].index(stop)
    steps = list(generate(model, PROMPTS, sampling=Sampling(), max_tokens=40, stop=[stop, "never there"]))
    texts = ["".join(pieces) for pieces in zip(*(step.text for step in steps), strict=True)]
    assert texts == [text.split(stop)[0] for text in whole]
    # Of row 1 the memory is what one reads up to the end of the stop string.
    drawn = int(steps[-1].memory.drawn[1])
    assert end < drawn < 40
    alone = list(generate(model, PROMPTS[1:2], sampling=Sampling(seed=1), max_tokens=drawn))[-1].memory
    for a, b in zip(alone.state, steps[-1].memory.state, strict=True):
        assert all(map(lambda x, y: torch.allclose(x[0], y[1], atol=1e-5), a, b))


def test_through_a_captured_step_is_as_without(model: LanguageModel) -> None:
    """And the step serves again, from another memory; what a step of generation gave does not change with the next."""
    step = CapturedStep(model, len(PROMPTS))
    for seed in (0, 3):
        options = dict(sampling=Sampling(seed=seed), max_tokens=25, stop=["e"])
        wanted = list(generate(model, PROMPTS, **options))
        found = list(generate(model, PROMPTS, **options, step=step))
        assert [x.text for x in found] == [x.text for x in wanted]
        for a, b in zip(found, wanted, strict=True):
            pairs = zip(states.flatten(a.memory).values(), states.flatten(b.memory).values(), strict=True)
            assert all(torch.allclose(x.float(), y.float(), atol=1e-5) for x, y in pairs)
    with pytest.raises(ValueError, match="captured step is that of another model"):
        next(generate(copy.deepcopy(model), PROMPTS, step=step))
    with pytest.raises(ValueError, match=r"a tensor of shape \[1, .*the memory is of \[3, "):
        next(generate(model, PROMPTS[:1], step=step))


def test_nothing_of_a_stop_string_is_shown() -> None:
    from longstate.generate import _Writer

    writer = _Writer(Bytes().stream(), ["END", "NDX"])
    shown = [writer.push(token, last=False) for token in b"an EN ENDX"]
    assert shown == ["a", "n", " ", "", "", "EN ", "", "", "", ""]
    assert writer.done
    writer = _Writer(Bytes().stream(), ["END"])
    assert [writer.push(token, last=i == 1) for i, token in enumerate(b"EN")] == ["", "EN"]


@pytest.mark.parametrize("captured", [False, True])
def test_an_inactive_row_does_not_change(model: LanguageModel, captured: bool) -> None:
    memory = read(model, [[1, 2, 3], [4, 5]])
    step = CapturedStep(model, 2) if captured else None
    after = advance(model, memory, Sampling(), torch.tensor([True, False]), step=step)
    assert torch.equal(after.token[1], memory.token[1])
    assert after.drawn.tolist() == [1, 0]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(after.state[0], memory.state[0], strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(after.state[0], memory.state[0], strict=True))


def test_entries_of_the_logits_that_are_no_tokens_are_never_drawn() -> None:
    model = LanguageModel(3, 16, [], pad_vocab_size_multiple=64)
    memory = read(model, [[0]])
    tokens = {int((memory := advance(model, memory, Sampling(temperature=50))).token) for _ in range(100)}
    assert tokens == {0, 1, 2}


class Words:
    """A tokenizer that knows fewer tokens than the model, begins a text with 9 and calls tokens by their number."""

    vocab_size = 10
    beginning = (9,)

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(x) for x in text], dtype=np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(map(str, tokens))

    def stream(self) -> Words:
        return self

    def push(self, token: int) -> str:
        return str(token)

    def finish(self) -> str:
        return "."

    def save(self, folder: object) -> None:
        raise NotImplementedError


def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn(model: LanguageModel) -> None:
    steps = list(generate(model, ["12", "3"], tokenizer=Words(), sampling=Sampling(temperature=9.0), max_tokens=60))
    drawn = torch.stack([step.memory.token for step in steps])
    assert drawn.max() == 9
    assert set(drawn.flatten().tolist()) == set(range(10))


def test_a_prompt_begins_as_the_tokenizer_says_and_what_follows_a_memory_does_not(model: LanguageModel) -> None:
    greedy = Sampling(temperature=0)
    at_once = written(model, ["123"], greedy, tokenizer=Words(), max_tokens=12)
    memory = read(model, [[9, 1]])
    assert written(model, ["23"], greedy, tokenizer=Words(), max_tokens=12, memory=memory) == at_once
    # Texts that begin with 9 and may be empty.
    assert written(model, [""], greedy, tokenizer=Words(), max_tokens=12) == written(
        model, None, greedy, tokenizer=Words(), max_tokens=12, memory=read(model, [[9]])
    )


def test_a_row_ends_before_a_stop_token_and_shows_what_was_held_back(model: LanguageModel) -> None:
    whole = [step.memory.token for step in generate(model, ["1", "2"], tokenizer=Words(), max_tokens=30)]
    end = int(whole[7][0])
    first = [int(token[0]) for token in whole].index(end)
    steps = list(generate(model, ["1", "2"], tokenizer=Words(), max_tokens=30, stop_tokens=[end, 11]))
    text = "".join(step.text[0] for step in steps)
    assert text == "".join(str(int(token[0])) for token in whole[:first]) + "."
    assert int(steps[-1].memory.drawn[0]) == first + 1
    assert int(steps[-1].memory.token[0]) == end


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_generation_refuses_what_makes_no_sense(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        next(generate(model, ["a", ""]))
    with pytest.raises(ValueError, match="neither prompts nor a memory"):
        next(generate(model))
    with pytest.raises(ValueError, match="a stop string is empty"):
        next(generate(model, ["a"], stop=[""]))
    with pytest.raises(ValueError, match="vocabulary of 256, the model of 300"):
        next(generate(LanguageModel(300, 8, []), ["a"]))
    with pytest.raises(ValueError, match="vocabulary of 10, the model of 9"):
        next(generate(LanguageModel(9, 8, []), ["1"], tokenizer=Words()))
    with pytest.raises(ValueError, match="3 prompts came for 2 sequences"):
        read(model, [[1], [1], [1]], read(model, [[1], [2]]))
    with pytest.raises(ValueError, match="there is no prompt"):
        read(model, [])


def test_a_memory_is_a_state(model: LanguageModel) -> None:
    from longstate import state as states

    memory = read(model, [[1, 2, 3], [4, 5]])
    swapped = states.select(memory, [1, 0])
    assert isinstance(swapped, Memory)
    one = written(model, None, Sampling(temperature=0), memory=memory, max_tokens=10)
    assert written(model, None, Sampling(temperature=0), memory=swapped, max_tokens=10) == one[::-1]
