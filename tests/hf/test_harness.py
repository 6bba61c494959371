"""lm-evaluation-harness runs tasks of local data through our class, and gets the numbers that one gets by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from longstate.hf import LongstateForCausalLM

Make = Callable[..., LongstateForCausalLM]
# Of the harness and what it imports, of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(59))]
QUESTIONS = [
    {
        "question": f"w{i} w{3 * i} w{i + 7}",
        "choices": [f"w{i + 1}", f"w{40 - i} w3", f"w{2 * i} w1 w1"],
        "answer": i % 3,
    }
    for i in range(8)
]
LINES = [" ".join(f"w{(5 * i + t * t) % 59}" for t in range(4 + 3 * i)) for i in range(5)]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def write_tasks(folder: Path) -> None:
    for name, rows in (("questions", QUESTIONS), ("lines", [{"text": line} for line in LINES])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"
    (folder / "choose.yaml").write_text(
        "task: choose\noutput_type: multiple_choice\n"
        + source.format(path=folder / "questions.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        + "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "perplexity.yaml").write_text(
        "task: perplexity\noutput_type: loglikelihood_rolling\n"
        + source.format(path=folder / "lines.jsonl")
        + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        + "metric_list:\n  - metric: word_perplexity\n    aggregation: weighted_perplexity\n"
    )


def test_a_text_ends_with_a_stop_string(make: Make) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(ord("A"), ord("A") + 61)]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.decoder = decoders.ByteLevel()
    model, tokens = make(), PreTrainedTokenizerFast(tokenizer_object=made)
    prompt = tokens("abc", return_tensors="pt")
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = tokens.decode(model.generate(**prompt, **given)[0])
    assert len(whole) == 15
    stop = next(letter for letter in whole[5:] if letter not in whole[:5])
    ended = model.generate(**prompt, **given, stop_strings=[stop], tokenizer=tokens)[0]
    assert tokens.decode(ended) == whole[: whole.index(stop) + 1]


def log_likelihood(model: LongstateForCausalLM, before: list[int], after: list[int]) -> float:
    """Return the logarithm of the probability of tokens after others, by our own model."""
    with torch.no_grad():
        logits = model.to_model()(torch.tensor([before + after]))[0][0, :, : len(WORDS)]
    rows = logits.log_softmax(-1)[len(before) - 1 : -1]
    return float(rows.gather(1, torch.tensor(after)[:, None]).sum())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tasks_of_local_data(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path)
    model, words = make(), tokenizer()
    harness = HFLM(pretrained=model, tokenizer=words, batch_size=batch_size, device="cpu", max_length=64)
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=["choose", "perplexity"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]

    def numbers(text: str) -> list[int]:
        return words(text).input_ids

    right = 0
    for row in QUESTIONS:
        scores = [log_likelihood(model, numbers(row["question"]), numbers(choice)) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert results["choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    total = sum(log_likelihood(model, [1], numbers(line)) for line in LINES)
    count = sum(len(line.split()) for line in LINES)
    assert results["perplexity"]["word_perplexity,none"] == pytest.approx(math.exp(-total / count), rel=1e-4)


def test_the_harness_writes_until_a_stop(make: Make) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, words = make(), tokenizer()
    harness = HFLM(pretrained=model, tokenizer=words, batch_size=2, device="cpu", max_length=64)
    texts = ["w1 w2 w3 w4", "w9", "w5 w6"]
    options = {"until": ["w0"], "max_gen_toks": 7, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
    for text, answer in zip(texts, harness.generate_until(asked), strict=True):
        ids = words(text, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
        assert answer == words.decode(alone, skip_special_tokens=True).split("w0")[0]
