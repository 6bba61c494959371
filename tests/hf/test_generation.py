"""What ``generate`` of transformers writes with our cache is what it writes without one, back and forth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from longstate.generate import Sampling, advance, read
from longstate.hf import LongstateCache, LongstateForCausalLM
from longstate.hf.cache import REREAD, Steps

Make = Callable[..., LongstateForCausalLM]
# An assistant is called with a configuration and single options at once.
pytestmark = pytest.mark.filterwarnings("ignore:Passing `generation_config` together with:UserWarning")


def tokens(batch: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(61, (batch, length))


def leaves(x: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(x)


def test_greedy_is_the_same_without_a_cache_and_in_our_own_program(make: Make) -> None:
    model, ids = make(), tokens(2)
    written = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(written, model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=False))
    memory, drawn = read(model.to_model(), ids.tolist()), []
    for _ in range(40):
        memory = advance(model.to_model(), memory, Sampling(temperature=0))
        drawn.append(memory.token)
    assert torch.equal(written[:, 20:], torch.stack(drawn, 1))
    assert len(set(written[0, 20:].tolist())) > 5, "a text that says something"


def test_sampling_and_beams_are_the_same_without_a_cache(make: Make) -> None:
    model, ids = make(), tokens(2)
    for options in (
        {"do_sample": True, "top_k": 20, "temperature": 2.0, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": False, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "repetition_penalty": 1.2},
    ):
        written = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            written.append(model.generate(ids, max_new_tokens=15, use_cache=use_cache, **options))
        assert torch.equal(*written), options


def test_beams_need_their_states_reordered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), tokens(2)
    wanted = model.generate(ids, max_new_tokens=15, num_beams=4, do_sample=False)
    monkeypatch.setattr(LongstateCache, "reorder_cache", lambda *_: None)
    assert not torch.equal(model.generate(ids, max_new_tokens=15, num_beams=4, do_sample=False), wanted)


def test_prompts_padded_on_the_left_are_each_alone(make: Make) -> None:
    model, ids = make(), tokens(3, 24)
    mask = torch.ones_like(ids)
    mask[0, :10], mask[2, :23] = 0, 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, first in ((0, 10), (1, 0), (2, 23)):
        alone = model.generate(ids[row : row + 1, first:], max_new_tokens=20, do_sample=False)
        assert torch.equal(together[row, 24:], alone[0, 24 - first :])


def test_a_row_that_ends_early_is_filled_up(make: Make) -> None:
    model, ids = make(), tokens(2)
    whole = model.generate(ids, max_new_tokens=30, do_sample=False)
    end = int(whole[0, 25])
    options = {"eos_token_id": end, "pad_token_id": 3, "max_new_tokens": 30, "do_sample": False}
    written = model.generate(ids, **options)
    for row in (0, 1):
        ends = (whole[row, 20:] == end).nonzero()
        count = int(ends[0]) + 1 if len(ends) else 30
        assert torch.equal(written[row, : 20 + count], whole[row, : 20 + count])
        assert (written[row, 20 + count :] == 3).all()


@pytest.mark.parametrize("at_a_time", [2, 9, 45])
@pytest.mark.parametrize("length", [4, 50])
def test_an_assistant_changes_no_token(make: Make, at_a_time: int, length: int) -> None:
    model, ids = make(), tokens(1, length)
    assistant = make(["mamba"], seed=1)
    with torch.no_grad():
        # Enough alike to be right at times: what follows is decided by the present token, more or less.
        for each in (model, assistant):
            each.backbone.embedding.weight.copy_(120 * model.backbone.embedding.weight)
        assistant.lm_head.weight.copy_(model.lm_head.weight)
    always_drafting(assistant, at_a_time)
    wanted = model.generate(ids, max_new_tokens=50, do_sample=False)
    lengths: list[int] = []
    counting(model).append(lengths)
    assert torch.equal(model.generate(ids, max_new_tokens=50, do_sample=False, assistant_model=assistant), wanted)
    assert max(lengths) <= length + at_a_time + 1 + REREAD
    # After the prompt a step reads the candidates, and what may be read again.
    assert max(lengths[2:], default=0) <= 2 * max(REREAD, at_a_time + 1)
    assert len(lengths) < 50, "some candidates were right"


def always_drafting(assistant: LongstateForCausalLM, at_a_time: int) -> None:
    """Have an assistant write so many candidates at a time, however unsure it is."""
    assistant.generation_config.num_assistant_tokens = at_a_time
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0


def counting(model: LongstateForCausalLM) -> list[list[int]]:
    """Have the model note in the last of these lists how many steps its stack is run over."""
    noted: list[list[int]] = []
    model.backbone.register_forward_pre_hook(lambda _, given: noted[-1].append(given[0].shape[1]) if noted else None)
    return noted


def test_a_model_that_assists_itself_is_always_right(make: Make) -> None:
    model, ids = make(), tokens(1, 40)
    wanted = model.generate(ids, max_new_tokens=50, do_sample=False)
    counted = counting(model)
    counted.append([])
    assistant = copy.deepcopy(model)
    assistant.backbone._forward_pre_hooks.clear()
    always_drafting(assistant, 10)
    assert torch.equal(model.generate(ids, max_new_tokens=50, do_sample=False, assistant_model=assistant), wanted)
    assert len(counted[0]) <= 7, "the prompt in two parts, and ten candidates with one more token each time"
    counted.append([])
    options = {"prompt_lookup_num_tokens": 4, "eos_token_id": 61, "pad_token_id": 0}  # an end that never comes
    looked_up = model.generate(ids, max_new_tokens=50, do_sample=False, **options)
    assert torch.equal(looked_up, wanted)
    sampled = model.generate(ids, max_new_tokens=9, do_sample=True, assistant_model=make(["mamba"], seed=1))
    assert sampled.shape == (1, 49)


def test_a_cache_goes_on_with_a_conversation(make: Make) -> None:
    model, cache = make(), LongstateCache()
    said = tokens(1, 30)
    for count in (10, 5, 8):
        answer = model.generate(said, max_new_tokens=count, do_sample=False, past_key_values=cache)
        assert torch.equal(answer, model.generate(said, max_new_tokens=count, do_sample=False))
        assert cache.get_seq_length() == answer.shape[1] - 1, "all but the last token, which nothing has followed yet"
        said = torch.cat([answer, tokens(1, 6)], 1)


def test_one_prefix_serves_many(make: Make) -> None:
    model, prefix = make(), LongstateCache()
    shared = tokens(1, 30)
    with torch.no_grad():
        model(shared, past_key_values=prefix)
    before = [x.clone() for x in leaves(prefix.state)]
    for _ in range(3):
        text = torch.cat([shared, tokens(1, 5)], 1)
        wanted = model.generate(text, max_new_tokens=9, do_sample=False)
        forked = copy.copy(prefix)
        assert torch.equal(model.generate(text, max_new_tokens=9, do_sample=False, past_key_values=forked), wanted)
        assert (prefix.get_seq_length(), forked.get_seq_length()) == (30, 43)
        # Beams: several of each sequence that was read before.
        beams = model.generate(text, max_new_tokens=9, num_beams=3, do_sample=False)
        forked = copy.copy(prefix)
        assert torch.equal(
            model.generate(text, max_new_tokens=9, num_beams=3, do_sample=False, past_key_values=forked), beams
        )
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(prefix.state), strict=True)), "never changed in place"


def test_generation_from_embedded_prompts(make: Make) -> None:
    model, ids = make(), tokens(2)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 20:]
    embedded = model.get_input_embeddings()(ids).detach()
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=12, do_sample=False), wanted)


def test_a_whole_configuration_and_other_options(make: Make) -> None:
    class Ends(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 25)

    model, ids = make(), tokens(2)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True)
    out = model.generate(ids, generation_config=config, stopping_criteria=StoppingCriteriaList([Ends()]))
    assert out.sequences.shape == (2, 25)
    assert len(out.scores) == 5
    assert out.scores[0].shape == (2, 61)
    assert isinstance(out.past_key_values, LongstateCache)
    without = GenerationConfig(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, use_cache=False)
    again = model.generate(ids, generation_config=without)
    assert again.past_key_values is None
    assert torch.equal(again.sequences, out.sequences)


# -------------------------------------------------------------------------------------------------------------- cache


@torch.no_grad()
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("drops", [[1], [3, 2], [9], [12, 1, 4]])
def test_going_back_is_never_having_read(make: Make, drops: list[int], embedded: bool) -> None:
    model, cache, ids = make(), LongstateCache(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 30:33] = 0, 0
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    cache.activate_past_recording()
    if embedded:
        model(
            inputs_embeds=model.get_input_embeddings()(ids[:, 20:28]),
            attention_mask=mask[:, :28],
            past_key_values=cache,
        )
    for at in range(28 if embedded else 20, 40):
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)
    kept = 40
    for drop in drops:
        cache.crop(-drop)
        kept -= drop
        assert cache.get_seq_length() == kept
    with pytest.raises(ValueError, match="the tokens that stay will be read again"):
        cache.state  # noqa: B018
    new = tokens(2, 4)
    mask = torch.cat([mask[:, :kept], torch.ones_like(new)], 1)
    logits = model(new, attention_mask=mask, past_key_values=cache).logits
    wanted = model(torch.cat([ids[:, :kept], new], 1), attention_mask=mask).logits[:, kept:]
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert cache.get_seq_length() == kept + 4


@torch.no_grad()
def test_how_far_back_a_cache_goes(make: Make) -> None:
    model, cache = make(), LongstateCache()
    model(tokens(1, 50), past_key_values=cache)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match=r"go back by 1 steps, but 0 are kept. Call activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    cache.activate_past_recording()
    assert cache.is_croppable
    model(tokens(1, 100), past_key_values=cache, logits_to_keep=41)
    cache.crop(110)  # as older versions of transformers have it: the length that stays
    assert cache.get_seq_length() == 110
    cache.crop(200)
    with pytest.raises(ValueError, match="go back by 33 steps, but 1 are kept"):
        cache.crop(-33)
    cache.crop(-1)
    assert [x.shape[0] for x in leaves(cache.state)], "what is wholly gone back from needs not be read again"
    model(tokens(1, 5), past_key_values=cache)
    cache.crop(0)
    with pytest.raises(ValueError, match="but 0 are kept"):
        cache.crop(-1)
    assert cache.get_seq_length() == 114
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.state, cache.is_initialized) == (0, -1, None, False)


@torch.no_grad()
def test_sequences_of_a_cache_are_chosen_as_states_are(make: Make) -> None:
    model, cache, ids = make(), LongstateCache(), tokens(3, 12)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    chosen, new = ids[[2, 2, 0, 0], :10], tokens(4, 3)
    logits = model(new, past_key_values=cache).logits
    wanted = model(torch.cat([chosen, new], 1)).logits[:, 10:]
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert cache.batch_size == 2
    with pytest.raises(ValueError, match="3 sequences came to a cache of 2"):
        model(tokens(3, 1), past_key_values=cache)
    assert not cache.is_compileable
    assert (cache.get_max_length(), cache.has_previous_state()) == (-1, True)


def test_steps_of_both_kinds_are_joined() -> None:
    embedding = torch.nn.Embedding(5, 3)
    ids = torch.tensor([[1, 2]])
    valid = torch.tensor([[False, True]])
    plain, masked = Steps(ids), Steps(embedding(ids), valid, ~valid)
    both = plain.followed_by(masked, embedding)
    assert torch.equal(both.inputs, embedding(torch.tensor([[1, 2, 1, 2]])))
    assert both.valid.tolist() == [[True, True, False, True]]
    assert both.start.tolist() == [[False, False, True, False]]
    assert both.slice(2, 4).valid.tolist() == [[False, True]]
    assert plain.followed_by(plain, embedding)[1:] == (None, None)
