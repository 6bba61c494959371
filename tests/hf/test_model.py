"""The wrapped model computes what the model computes, whatever it is given, and its folders are one format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import longstate
from longstate.hf import LongstateCache, LongstateConfig, LongstateForCausalLM

Make = Callable[..., LongstateForCausalLM]


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(61, (batch, length))


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= bound * b.abs().max())


@torch.no_grad()
def test_logits_are_those_of_the_language_model(make: Make) -> None:
    model = make(logits_divisor=3.0, logits_soft_cap=5.0, embedding_multiplier=2.0, tie_embeddings=True)
    ids = tokens()
    wanted = model.to_model()(ids)[0]
    assert wanted.shape[-1] == 64
    assert torch.equal(model(ids).logits, wanted[..., :61]), "no logits for rows that fill up the embedding"
    assert torch.equal(model(ids, return_dict=False)[0], wanted[..., :61])
    # Few rows are multiplied by another kernel, whose sums are in another order.
    assert close(model(ids, logits_to_keep=3).logits, wanted[:, -3:, :61])
    assert close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, wanted[:, [2, 5], :61])
    again = LongstateForCausalLM.from_model(model.to_model())
    assert torch.equal(again(ids).logits, wanted[..., :61])
    assert again.backbone.embedding.weight is model.backbone.embedding.weight
    assert again.lm_head.weight is model.backbone.embedding.weight
    assert not any(p.is_meta for p in again.parameters())


@torch.no_grad()
def test_embedded_inputs_are_the_tokens_they_stand_for(make: Make) -> None:
    model = make(embedding_multiplier=2.0)
    ids = tokens()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 7, 19])
def test_pieces_with_a_cache_are_the_whole(make: Make, cut: int) -> None:
    model, ids = make(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    whole = model(ids, attention_mask=mask, use_cache=False)
    assert whole.past_key_values is None
    first = model(ids[:, :cut], attention_mask=mask[:, :cut])
    rest = model(ids[:, cut:], attention_mask=mask, past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, rest.logits], 1)
    assert close(logits[mask == 1], whole.logits[mask == 1])
    # The mask of the new steps alone says the same.
    cache = model(ids[:, :cut], attention_mask=mask[:, :cut]).past_key_values
    again = model(ids[:, cut:], attention_mask=mask[:, cut:], past_key_values=cache)
    assert torch.equal(again.logits, rest.logits)
    assert again.past_key_values.get_seq_length() == 20


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_anywhere_changes_nothing_of_what_counts(make: Make, use_cache: bool) -> None:
    model, ids = make(), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 8:], mask[2, 3:5] = 0, 0, 0
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    right = model(ids[1:2], attention_mask=mask[1:2], use_cache=use_cache).logits
    for row, given in ((0, logits[0]), (1, logits[1]), (2, logits[2]), (1, right[0])):
        counts = mask[row] == 1
        assert close(given[counts], model(ids[row : row + 1, counts]).logits[0])


@torch.no_grad()
def test_documents_of_one_row_are_kept_apart_by_positions(make: Make) -> None:
    model, ids = make(), tokens(1, 20)
    position = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(ids, position_ids=position).logits
    apart = torch.cat([model(ids[:, :8]).logits, model(ids[:, 8:]).logits], 1)
    assert close(packed, apart)
    assert not close(model(ids).logits, apart, 1e-2)
    pieces = model(ids[:, :8]).past_key_values
    assert close(model(ids[:, 8:], past_key_values=pieces, position_ids=position[:, 8:]).logits, apart[:, 8:])
    # Short documents, and padding on the right, which is left out without a cache.
    position = torch.tensor([[0, 0, 1, 0, 1, 2, 3, 4, 0, 0, 0]])
    mask = torch.tensor([[1] * 8 + [0] * 3])
    pieces = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 1), (1, 3), (3, 8))], 1)
    for use_cache in (False, True):
        given = model(ids[:, :11], position_ids=position, attention_mask=mask, use_cache=use_cache)
        assert close(given.logits[:, :8], pieces)
    # Positions that only count on begin nothing.
    assert torch.equal(model(ids, position_ids=torch.arange(20)[None]).logits, model(ids).logits)


def test_the_loss_is_that_of_the_next_token_where_there_is_a_label(make: Make) -> None:
    model, ids = make(), tokens()
    labels = ids.clone()
    labels[0, :6] = -100
    out = model(ids, labels=labels)
    logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert out.loss.item() == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=1e-6)
    whole = functional.cross_entropy(logits, targets, reduction="sum").item()
    assert model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss.item() == pytest.approx(whole / 7)
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert model(ids, shift_labels=shifted).loss.item() == pytest.approx(out.loss.item())
    assert model(ids, labels=labels, logits_to_keep=2).logits.shape[1] == 2
    ours, _ = model.to_model().loss(ids[:, :-1], labels[:, 1:])
    # The padded rows of the embedding take part in our own loss; here they are no tokens.
    assert 0 < ours.item() - out.loss.item() < 1


@torch.no_grad()
def test_who_applies_the_head_alone_finds_what_it_takes(make: Make) -> None:
    model, ids = make(logits_divisor=3.0, logits_soft_cap=5.0), tokens()
    hidden = model.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T / model.config.logits_scaling
    cap = model.config.final_logit_softcapping
    assert close((cap * (logits / cap).tanh())[..., :61], model(ids).logits)
    assert torch.equal(model.get_decoder()(ids).last_hidden_state, hidden)
    assert not list(model.base_model.parameters())


def test_documents_packed_into_a_row_teach_what_they_teach_one_by_one(make: Make) -> None:
    from transformers import DataCollatorWithFlattening

    model = make().train()
    rows = [{"input_ids": tokens(1, length)[0].tolist()} for length in (9, 4, 12)]
    packed = DataCollatorWithFlattening(return_tensors="pt")(rows)
    assert packed["input_ids"].shape == (1, 25)
    loss = model(**packed).loss
    apart = [
        model(ids, labels=ids, num_items_in_batch=1).loss for row in rows for ids in [torch.tensor([row["input_ids"]])]
    ]
    assert loss.item() == pytest.approx(sum(x.item() for x in apart) / 22, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_cache_is_returned_when_it_is_wanted(make: Make, training: bool) -> None:
    model = make().train(training)
    assert (model(tokens()).past_key_values is None) == training
    assert isinstance(model(tokens(), use_cache=True).past_key_values, LongstateCache)
    model.config.use_cache = False
    assert model(tokens()).past_key_values is None


def test_gradient_checkpointing_saves_activations_and_changes_no_gradient(make: Make) -> None:
    model = make().train()
    ids = tokens()

    def run() -> tuple[dict[str, torch.Tensor], int]:
        model.zero_grad()
        held = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, held

    plain, much = run()
    # "activation" since transformers 5.20 or so, "gradient" before.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    assert model.gradient_checkpointing
    checkpointed, little = run()
    getattr(model, f"{name}_disable")()
    assert not model.gradient_checkpointing
    assert len(plain) > 40
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-6) for name in plain)
    assert little < much / 2


@torch.no_grad()
def test_hidden_states_are_the_residual_stream(make: Make) -> None:
    model, ids = make(), tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.config.layers) + 1
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1])[..., :61], out.logits)
    cache = LongstateCache()
    cache.activate_past_recording()
    long = tokens(1, 50)
    pieces = model(long, output_hidden_states=True, past_key_values=cache, logits_to_keep=1).hidden_states
    whole = model(long, output_hidden_states=True).hidden_states
    assert all(close(a, b, 1e-4) for a, b in zip(pieces, whole, strict=True))
    cache.crop(-5)
    again = model(long[:, 45:], output_hidden_states=True, past_key_values=cache).hidden_states
    assert all(close(a, b[:, 45:], 1e-4) for a, b in zip(again, whole, strict=True)), "without what is read again"
    assert model(ids).hidden_states is None


@torch.no_grad()
def test_bfloat16(make: Make) -> None:
    model, ids = make(), tokens()
    narrow = copy.deepcopy(model).bfloat16()
    assert narrow(ids).logits.dtype in (torch.bfloat16, torch.float32)
    assert close(narrow(ids).logits.float(), model(ids).logits, 0.2)
    assert narrow.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 24)


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_one_folder_for_both(make: Make, tmp_path: Path, tied: bool) -> None:
    model, ids = make(tie_embeddings=tied), tokens()
    assert model.config.tie_word_embeddings is tied
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "theirs")
    ours = longstate.load(tmp_path / "theirs")
    assert torch.equal(ours(ids)[0][..., :61], wanted)
    longstate.save(ours, tmp_path / "ours")
    with open(tmp_path / "ours" / "config.json") as file:
        assert json.load(file)["architectures"] == ["LongstateForCausalLM"]
    for name in ("ours", "theirs"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert isinstance(loaded, LongstateForCausalLM)
        assert torch.equal(loaded(ids).logits, wanted)
        assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
        marks = {n for n, p in loaded.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marks == {n for n, p in ours.named_parameters() if getattr(p, "_no_weight_decay", False)} != set()
        assert loaded.config.options() == model.config.options()
        assert not loaded.training


@torch.no_grad()
def test_a_folder_in_several_files(make: Make, tmp_path: Path) -> None:
    model, ids = make(), tokens()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert torch.equal(longstate.load(tmp_path)(ids)[0][..., :61], model(ids).logits)


@torch.no_grad()
def test_types_devices_and_options_on_loading(make: Make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        loaded = LongstateForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map=None)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    model.bfloat16().save_pretrained(tmp_path)
    assert LongstateForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    loaded, report = LongstateForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert AutoConfig.from_pretrained(tmp_path) == loaded.config


def test_what_a_file_lacks_is_drawn_and_what_it_has_stays(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lacking = {"backbone.layers.0.mixer.A_log", "backbone.layers.2.mixer.dt_proj.bias", "backbone.norm_f.weight"}
    with torch.no_grad():
        for name in tensors:
            tensors[name] += 0.25  # what no initial value is
    save_file({k: v for k, v in tensors.items() if k not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = LongstateForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == lacking
    for name, value in loaded.state_dict().items():
        assert torch.isfinite(value).all()
        if name != "lm_head.weight":
            assert torch.equal(value, tensors[name]) == (name not in lacking), name
    assert torch.equal(loaded.backbone.norm_f.weight, torch.ones(16))
    step = torch.nn.functional.softplus(loaded.backbone.layers[2].mixer.dt_proj.bias)
    assert (step > 9e-4).all() and (step < 0.11).all() and step.std() > 0, "as the mixer draws it, not as memory was"


def test_a_new_model_is_drawn_as_ours() -> None:
    options = {"vocab_size": 61, "d_model": 16, "layers": ["mamba", "s5"]}
    torch.manual_seed(3)
    ours = longstate.LanguageModel(**options)
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(LongstateConfig(**options))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    with torch.device("meta"):
        assert all(p.is_meta for p in LongstateForCausalLM(LongstateConfig(**options)).parameters())


@torch.no_grad()
def test_another_number_of_tokens(make: Make, tmp_path: Path) -> None:
    model, ids = make(), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(ids).logits.shape[-1] == 70
    assert torch.equal(model(ids).logits[..., :61], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(longstate.load(tmp_path)(ids)[0], model(ids).logits)


# ------------------------------------------------------------------------------------------------------------ options


def test_a_configuration_says_what_it_is_of(tmp_path: Path) -> None:
    config = LongstateConfig(hidden_size=32, layers=["mamba", {"mixer": "attention", "n_heads": 2}], norm_eps=1e-6)
    assert (config.d_model, config.hidden_size, config.num_hidden_layers, config.norm_eps) == (32, 32, 2, 1e-6)
    assert config.options()["layers"][1] == {"mixer": "attention", "n_heads": 2}
    assert LongstateConfig(tie_word_embeddings=False).tie_embeddings is False
    assert config != LongstateConfig()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == config
    assert LongstateConfig(pad_token_id=3, id2label={0: "a"}).pad_token_id == 3


def test_mistakes_are_said(make: Make) -> None:
    with pytest.raises(ValueError, match=r"unknown option 'pad_vocab_multiple'. Did you mean 'pad_vocab_size_mult"):
        LongstateConfig(pad_vocab_multiple=8)
    with pytest.raises(ValueError, match="there is no mixer 'mamba3'"):
        LongstateForCausalLM(LongstateConfig(layers=["mamba3"]))
    model, ids = make(), tokens()
    with pytest.raises(ValueError, match="wanted either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="wanted either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match=r"input_ids of shape \[20\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"input_ids of shape \[2, 20\] and type torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"cache_implementation='static' came"):
        model.generate(ids, cache_implementation="static", max_new_tokens=1)
    with pytest.raises(ValueError, match="a LongstateForCausalLM came, wanted a LanguageModel"):
        LongstateForCausalLM.from_model(model)
    with pytest.raises(TypeError, match="unexpected arguments token_type_ids"):
        model(ids, token_type_ids=ids)
    with pytest.raises(ValueError, match="there are no attention maps"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask of shape \[2, 19\]"):
        model(ids, attention_mask=torch.ones(2, 19))
    full = DynamicCache()
    full.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    with pytest.raises(ValueError, match="past_key_values of type DynamicCache"):
        model(ids, past_key_values=full)
    assert isinstance(model(ids, past_key_values=DynamicCache()).past_key_values, LongstateCache)


def test_a_model_of_ours_is_wrapped(make: Make, tmp_path: Path) -> None:
    from longstate.hf import load_pretrained

    model = make()
    longstate.save(model.to_model(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    loaded: Any = load_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, PreTrainedModel)
    assert (loaded.dtype, loaded.config.dtype) == (torch.float64, torch.float64)
    assert loaded.generation_config.eos_token_id == 5
    assert loaded.name_or_path == str(tmp_path)


@torch.no_grad()
def test_a_model_is_saved_over_the_folder_that_it_is_mapped_from(make: Make, tmp_path: Path) -> None:
    from longstate.hf import load_pretrained

    longstate.save(make().to_model(), tmp_path)
    model, ids = load_pretrained(tmp_path), tokens()
    before = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(load_pretrained(tmp_path)(ids).logits, before)
    with pytest.raises(ValueError, match=r"a LongstateForCausalLM came, wanted a LanguageModel. Give its to_model\(\)"):
        longstate.save(model, tmp_path)


def test_a_model_of_another_family_is_wrapped(tmp_path: Path) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from longstate.hf import load_pretrained

    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=61,
            hidden_size=16,
            num_heads=4,
            head_dim=8,
            state_size=8,
            n_groups=1,
            num_hidden_layers=2,
            eos_token_id=7,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"configuration of a 'mamba2' model. Read .* with longstate.hf.load_pretr"):
        LongstateForCausalLM.from_pretrained(tmp_path)
    ours, ids = load_pretrained(tmp_path), tokens()
    assert close(ours(ids).logits, theirs(ids).logits)
    assert ours.generation_config.eos_token_id == [7]
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert again.generation_config.eos_token_id == [7]
