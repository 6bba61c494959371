"""``generate`` and ``info`` on the folder of a published model, as transformers writes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from longstate.cli import main  # noqa: E402  only where there is transformers

Run = Callable[..., str]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SPECIAL = ["<s>", "</s>", "[user]", "[assistant]"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert left.value.code == code, shown.err
        return shown.err if code else shown.out

    return call


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with a Mamba, a tokenizer with a chat template, and a token that ends texts; and both as theirs."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("published")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # More rows than there are tokens.
    config = transformers.MambaConfig(
        vocab_size=272, hidden_size=16, state_size=4, num_hidden_layers=2, tie_word_embeddings=False
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 40
        # Rows that no token has: transformers draws them where they are likely, and we do not.
        model.lm_head.weight[260:] = 0
    model.save_pretrained(folder)
    transformers.logging.enable_progress_bar()
    return folder, model, tokenizer


def theirs(model: Any, tokenizer: Any, ids: list[int], count: int, end: int) -> str:
    """Return what transformers writes on, without a cache, up to the token that ends texts."""
    given = torch.tensor([ids])
    written = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, use_cache=False,
        eos_token_id=end, pad_token_id=0,
    )  # fmt: skip
    new = written[0, len(ids) :].tolist()
    return tokenizer.decode(new[: new.index(end)] if end in new else new)


def ending(folder: Path, model: Any, ids: list[int]) -> int:
    """Choose which token ends texts: the one that this text has after nine others."""
    given = torch.tensor([ids])
    written = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=10, do_sample=False, use_cache=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    end = int(written[0, -1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 257]}))
    return end


def test_generate_writes_what_transformers_writes(run: Run, published: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = published
    ids = tokenizer("Once upon").input_ids
    assert ids[0] == 256, "a text begins with a special token"
    end = ending(folder, model, ids)
    shown = run("generate", folder, "--prompt", "Once upon", "--max-tokens", 40, "--temperature", 0)
    assert shown == "Once upon" + theirs(model, tokenizer, ids, 40, end) + "\n"


def test_chat_asks_with_the_template_and_prints_the_answer(
    run: Run, published: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import longstate.cli.generate as command

    given, read = [], command.read
    monkeypatch.setattr(command, "read", lambda model, prompts, memory: given.append(prompts) or read(model, prompts))
    folder, model, tokenizer = published
    messages = [{"role": "user", "content": "Who?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[:2] == [256, 258], "one special token at the beginning, not two"
    end = ending(folder, model, ids)
    options = ("--max-tokens", 40, "--temperature", 0)
    answer = theirs(model, tokenizer, ids, 40, end)
    assert run("generate", folder, "--chat", "--prompt", "Who?", *options) == answer + "\n"
    (folder / "prompts.txt").write_text("Who?\nWho?\n")
    both = run("generate", folder, "--chat", "--prompts-file", folder / "prompts.txt", *options)
    assert both == f"[1] {answer}\n\n[2] {answer}\n"
    assert given == [[ids], [ids, ids]]


def test_info_takes_it_too(run: Run, published: tuple[Path, Any, Any]) -> None:
    folder, model, _ = published
    total = next(line for line in run("info", folder).splitlines() if line.startswith("all")).replace(",", "")
    assert int(total.split()[1]) == sum(p.numel() for p in model.parameters())


def test_what_cannot_be_is_said(
    run: Run, published: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longstate.hf import render_chat

    folder = published[0]
    shown = run("generate", folder, "--chat", "--prompt", "a", "--state-in", "x", code=2)
    assert "--chat begins a conversation" in shown
    assert "--chat came without a message" in run("generate", folder, "--chat", code=2)
    with pytest.raises(ValueError, match="does not take these messages"):
        render_chat(folder, [{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="no tokenizer that transformers reads"):
        render_chat(tmp_path, [{"role": "user", "content": "x"}])
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template. Put the chat_template.jinja"):
        render_chat(tmp_path, [{"role": "user", "content": "x"}])
    # A template runs in a sandbox.
    plain.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not take these messages"):
        render_chat(tmp_path, [{"role": "user", "content": "x"}])
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("longstate.hf")]:
        monkeypatch.delitem(sys.modules, name)
    shown = run("generate", folder, "--chat", "--prompt", "a", code=2)
    assert "pip install 'longstate[hf]'" in shown
