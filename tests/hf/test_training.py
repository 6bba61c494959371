"""Trainer, PEFT and TRL take our models as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from longstate.hf import LORA_TARGETS, LongstateForCausalLM, lora_targets
from longstate.mixers import MIXERS

# What peft and trl call in transformers has another name in its latest versions.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
Make = Callable[..., LongstateForCausalLM]
SMALL: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 8, "head_dim": 8},
    "attention": {"n_heads": 2},
    "rglru": {"n_heads": 2},
    "s4d": {"d_state": 4},
    "s5": {"d_state": 4, "output": "identity"},
}
PROJECTIONS = ["mamba2", "attention", "mamba", "rglru", "short_conv"]
EXPERTS = {"kind": "experts", "n_experts": 3, "top_k": 2, "hidden": 8, "shared": 8, "latent": 8}


def layers(names: list[str]) -> list[dict[str, Any]]:
    return [{"mixer": name, **SMALL.get(name, {})} for name in names]


def texts(count: int = 32) -> list[dict[str, list[int]]]:
    """Sequences that count on by a step of their own, of several lengths."""
    made = []
    for i in range(count):
        ids = [(7 * i + (1 + i % 3) * t) % 61 for t in range(10 + i % 5)]
        made.append({"input_ids": ids, "labels": ids})
    return made


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Join sequences of several lengths, filled up on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    ids, labels = filled("input_ids", 0), filled("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def adapted(model: LongstateForCausalLM, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options))


def train(model: Any, folder: Path, named: str = "loss", **options: Any) -> list[float]:
    """Fine-tune with Trainer, and return the losses that it logged under a name."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    given = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 3e-2, **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **given,
    )
    data = texts()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:6], data_collator=padded)
    trainer.train()
    return [entry[named] for entry in trainer.state.log_history if named in entry]


def drawn(model: Any) -> Any:
    """Give the adapters values: at first they change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trainer_fine_tunes_with_adapters_and_the_loss_falls(make: Make, tmp_path: Path, checkpointed: bool) -> None:
    model = make(layers(PROJECTIONS), pad_vocab_size_multiple=1)
    with torch.no_grad():
        model.lm_head.weight /= 4
    before = {name: x.clone() for name, x in model.state_dict().items()}
    tuned = adapted(model)
    losses = train(tuned, tmp_path, gradient_checkpointing=checkpointed)
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5
    merged = tuned.merge_and_unload()
    changed = {name for name, x in merged.state_dict().items() if not torch.equal(x, before[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "1", "2", "3", "4"}, "every layer learned"


def test_accumulated_steps_are_one_mean_over_tokens(make: Make, tmp_path: Path) -> None:
    losses = []
    for size, steps in ((8, 1), (2, 4)):
        model = make(layers(["mamba"]))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        losses.append(train(model, tmp_path, seed=3, learning_rate=1e-3, **options))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("wrap", [adapted, lambda model: model])
def test_trainer_evaluates(make: Make, tmp_path: Path, wrap: Callable[..., Any]) -> None:
    model = wrap(make(layers(["mamba2"])))
    options = {"max_steps": 2, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    losses = train(model, tmp_path, "eval_loss", **options)
    with torch.no_grad():
        expected = model.eval()(**padded(texts()[:6])).loss.item()
    assert losses == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_kind_of_layer_is_adapted(make: Make, name: str) -> None:
    model = make(layers([name, name]))
    tuned = adapted(model, **lora_targets(model))
    learning = {n.replace("base_model.model.", "") for n, p in tuned.named_parameters() if p.requires_grad}
    for layer in (0, 1):
        assert any(n.startswith(f"backbone.layers.{layer}.mixer") for n in learning)
    if name != "s5":
        assert all("lora_" in n for n in learning)
        # And all its projections by default.
        default = adapted(make(layers([name, name])))
        assert {n for n, p in default.named_parameters() if p.requires_grad} == {
            f"base_model.model.{n}" for n in learning
        }
    ids = torch.randint(61, (2, 12))
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    silent = {n for n, p in tuned.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # A's gradient is zero as long as B is.
    assert all("lora_A" in n for n in silent), silent


def test_every_linear_layer_has_a_name_that_is_adapted(make: Make) -> None:
    model = make(
        [
            *layers(sorted(MIXERS)),
            {"mixer": None, "mlp": {"kind": "plain", "hidden": 8}},
            {"mixer": None, "mlp": {"hidden": 8}},
            {"mixer": None, "mlp": EXPERTS},
        ]
    )
    linear = {n for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear)}
    left = {n.split(".", 2)[2] for n in linear if n.rpartition(".")[2] not in LORA_TARGETS}
    writers = {n for n in left if n.startswith(("mixer.filter.", "mixer.layers."))}  # of Hyena's and TNN's taps
    assert left - writers == {"mlp.router"}
    assert lora_targets(model)["modules_to_save"] == [f"layers.{sorted(MIXERS).index('s5')}.mixer"]


@torch.no_grad()
def test_merged_is_unmerged(make: Make) -> None:
    ids = torch.randint(61, (2, 30))
    model = make([*layers(PROJECTIONS), {"mixer": None, "mlp": {"hidden": 16}}, {"mixer": "s5", "mlp": EXPERTS}])
    plain = model(ids).logits
    tuned = drawn(adapted(model))
    unmerged = tuned(input_ids=ids).logits
    assert (unmerged - plain).abs().max() > 0.05 * plain.abs().max(), "the adapters do something"
    written = tuned.generate(input_ids=ids, max_new_tokens=15, do_sample=False)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, LongstateForCausalLM)
    assert (merged(ids).logits - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    assert torch.equal(merged.generate(ids, max_new_tokens=15, do_sample=False), written)
    assert torch.equal(merged.to_model()(ids)[0][..., :61], merged(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTIONS)
def test_weights_split_into_direction_and_size_are_merged(make: Make, name: str) -> None:
    ids = torch.randint(61, (2, 12))
    tuned = drawn(adapted(make(layers([name])), use_dora=True))
    for parameter_name, parameter in tuned.named_parameters():
        if "magnitude" in parameter_name:
            parameter.mul_(1.3)
    unmerged = tuned(input_ids=ids).logits
    assert (tuned.merge_and_unload()(ids).logits - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()


@torch.no_grad()
def test_routed_experts_are_adapted(make: Make) -> None:
    routed = {"kind": "experts", "n_experts": 3, "top_k": 2, "hidden": 8}
    model = make([*layers(["mamba"]), {"mixer": None, "mlp": routed}])
    ids = torch.randint(61, (2, 12))
    plain = model(ids).logits
    tuned = adapted(model, **lora_targets(model))
    named = {n: p for n, p in tuned.named_parameters() if p.requires_grad and ".layers.1.mlp." in n}
    assert len(named) == 4, "two matrices for each of the experts' two"
    for name, parameter in named.items():
        parameter.normal_(std=0.3 if "lora_B" in name else 0.1)
    unmerged = tuned.eval()(input_ids=ids).logits
    assert (unmerged - plain).abs().max() > 0.01 * plain.abs().max()
    merged = tuned.merge_and_unload()(ids).logits
    assert (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()


@torch.no_grad()
def test_adapters_in_a_folder(make: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.randint(61, (2, 9))
    tuned = drawn(adapted(make(layers(["mamba", "s5"])), **lora_targets(make(layers(["mamba", "s5"])))))
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(layers(["mamba", "s5"])), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, tuned(input_ids=ids).logits)


def test_prompt_tuning_learns_virtual_tokens(make: Make) -> None:
    peft = pytest.importorskip("peft")
    # peft finds the embedding by its number of rows.
    model = make(layers(["mamba2", "attention"]), pad_vocab_size_multiple=1)
    # Its number of heads says nothing here; peft asks for one all the same.
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1)
    tuned = peft.get_peft_model(model, config)
    ids = torch.randint(61, (2, 9))
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert [n for n, p in tuned.named_parameters() if p.grad is not None] == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of trl, of itself
def test_trl_fine_tunes(make: Make, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(59))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    rows = [{"text": " ".join(f"w{(i + (1 + i % 3) * t) % 59}" for t in range(8 + i % 4))} for i in range(24)]
    model = make(layers(PROJECTIONS))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=pytest.importorskip("peft").LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
