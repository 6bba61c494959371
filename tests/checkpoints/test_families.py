"""Models of every family compute what transformers computes, in one call, in pieces and in steps, and come back out."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import longstate  # noqa: E402
from checkpoints import families  # noqa: E402
from longstate.checkpoints import families as tables  # noqa: E402
from longstate.checkpoints import load_pretrained, save  # noqa: E402
from longstate.checkpoints._options import Options  # noqa: E402
from longstate.checkpoints._parts import Part  # noqa: E402
from longstate.generate import Sampling, advance, read  # noqa: E402

SEEDS = range(20)
CLOSE = 1e-5  # of the largest logit; the worst of all is a quarter of it


def far(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype == torch.float32
    assert wanted.std() > 0.01 and wanted.isfinite().all(), "logits that say nothing"
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def in_pieces(model: longstate.LanguageModel, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Read tokens piece by piece."""
    state, found = None, []
    for piece in tokens.tensor_split(cuts, 1):
        logits, state = model(piece, state)
        found.append(logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_those_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    theirs = families.write(name, seed, tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs").eval()
    tokens = torch.randint(theirs.config.vocab_size, (2, 10))
    wanted = families.logits(theirs, tokens)
    with torch.no_grad():
        assert far(ours(tokens)[0], wanted) < CLOSE
        assert far(in_pieces(ours, tokens, [7]), wanted) < CLOSE
        assert far(in_pieces(ours, tokens, list(range(1, 10))), wanted) < CLOSE

    save(ours, tmp_path / "out", family=name)
    again = load_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == ours.state_dict().keys()
    for key, x in ours.state_dict().items():
        assert torch.equal(x, again.state_dict()[key]), key
    if seed < 6:  # opening takes transformers longer than all else here
        opened = families.opened(name, tmp_path / "out")
        assert type(opened) is type(theirs)
        assert far(families.logits(opened, tokens), wanted) < 1e-6
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens)[0], ours(tokens)[0])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of each prompt alone, and of both together, the shorter one padded."""
    for seed in range(100, 200):
        theirs = families.write(name, seed, tmp_path / str(seed))
        ours = load_pretrained(tmp_path / str(seed)).eval()
        prompts = [torch.randint(theirs.config.vocab_size, (length,)) for length in (5, 12)]
        # Most random models say the same again and again, which the first few tokens show.
        if all(len(set(greedy(ours, [prompt], 12)[0])) > 4 for prompt in prompts):
            break
    found = [greedy(ours, [prompt])[0] for prompt in prompts]
    assert all(len(set(tokens)) > 4 for tokens in found)
    assert greedy(ours, prompts) == found
    for prompt, tokens in zip(prompts, found, strict=True):
        # Without a cache: with one, some of its models go wrong.
        wanted = theirs.generate(prompt[None], max_new_tokens=32, do_sample=False, use_cache=False)
        assert tokens == wanted[0, len(prompt) :].tolist()


def greedy(model: longstate.LanguageModel, prompts: list[torch.Tensor], count: int = 32) -> list[list[int]]:
    """Return the most likely tokens after each prompt."""
    memory, found = read(model, prompts), []
    for _ in range(count):
        memory = advance(model, memory, Sampling(temperature=0))
        found.append(memory.token)
    return torch.stack(found, 1).tolist()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_default_configuration_is_read_as_transformers_means_it(name: str) -> None:
    """What a config.json leaves out has its family's default."""
    module = next(m for m in modules() if m.FAMILY.name == name)
    config = getattr(transformers, families.FAMILIES[name][0]).config_class()
    seen = 0
    for part in vars(module).values():
        for theirs, default in part.options.values() if isinstance(part, Part) else ():
            found = getattr(config, theirs)
            assert found == default and type(found) is type(default), theirs
            seen += 1
    assert seen > 6
    layers = module.FAMILY.read(Options("nothing", {}, 10**4))["layers"]
    for layer in layers:
        assert "rotary_base" not in layer or layer["rotary_base"] == config.rope_parameters["rope_theta"]


def modules() -> list[Any]:
    """Return the tables, one module each."""
    names = (info.name for info in pkgutil.iter_modules(tables.__path__) if not info.name.startswith("_"))
    return [importlib.import_module(f"{tables.__name__}.{name}") for name in names]


def test_every_family_is_tested() -> None:
    assert {module.FAMILY.name for module in modules()} == set(tables.FAMILIES)
    assert set(tables.FAMILIES) - set(families.FAMILIES) == {"state-spaces", "codestral"}  # see test_layouts.py


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_type_for_all(dtype: torch.dtype, tmp_path: Path) -> None:
    families.write("nemotron_h", 3, tmp_path)
    kept, cast = load_pretrained(tmp_path), load_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in kept.parameters()} == {torch.float32} and {p.dtype for p in cast.parameters()} == {dtype}
    for name, x in kept.named_parameters():
        assert torch.equal(x.to(dtype), cast.get_parameter(name)), name
    for name, b in kept.named_buffers():  # compared with scores in float32
        assert b.dtype == torch.float32 and torch.equal(b, cast.get_buffer(name)), name
    assert dict(kept.named_buffers())


def test_pieces_smaller_than_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.write("granitemoehybrid", 2, tmp_path)
    whole = load_pretrained(tmp_path, dtype=torch.float64)
    monkeypatch.setattr("longstate.checkpoints._tensors.CHUNK", 7)
    in_pieces = load_pretrained(tmp_path, dtype=torch.float64)
    for name, x in whole.state_dict().items():
        assert torch.equal(x, in_pieces.state_dict()[name]), name
