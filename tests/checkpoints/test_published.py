"""Configurations and names of tensors as published, at their full size and shrunk, against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from checkpoints import families  # noqa: E402
from checkpoints.published import MODELS, ORIGINALS, TENSORS  # noqa: E402
from checkpoints.test_families import CLOSE, far, in_pieces  # noqa: E402
from longstate.checkpoints import load_pretrained  # noqa: E402
from longstate.checkpoints._fill import tensors_of  # noqa: E402
from longstate.checkpoints._options import Options  # noqa: E402
from longstate.checkpoints.published import recognise  # noqa: E402
from longstate.models import LanguageModel  # noqa: E402

# What files of numbers in bfloat16 hold in float32.
WIDE = ("A_log", ".D", "dt_bias", "e_score_correction_bias")


def shape_of(folder: Path, config: dict[str, Any], name: str = "config.json") -> LanguageModel:
    """Return the model of a configuration alone, on the meta device."""
    (folder / name).write_text(json.dumps(config))
    family, path, found = recognise(folder)
    assert family is not None
    with torch.device("meta"):
        return LanguageModel.from_config(family.read(Options(str(path), found, 10**6)))


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", {**MODELS, **ORIGINALS})
def test_as_many_numbers_as_published(name: str, original: bool, tmp_path: Path) -> None:
    table = ORIGINALS if original else MODELS
    if name not in table:
        return
    file = "params.json" if "dim" in table[name].config else "config.json"
    shapes = tensors_of(shape_of(tmp_path, table[name].config, file))
    found = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert table[name].numbers in (None, found)


def test_that_many_are_known() -> None:
    assert sum(model.numbers is not None for model in (*MODELS.values(), *ORIGINALS.values())) >= 15


def layers_of(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Return names and shapes in each layer, as mamba_ssm makes them."""
    d = config.get("d_model", config.get("dim"))
    inner, groups, heads = 2 * d, config.get("n_groups", 1), 2 * d // 64
    joined = inner + 2 * groups * 128
    found: list[dict[str, tuple[int, ...]]] = []
    for i in range(config.get("n_layer", config.get("n_layers"))):
        if i in config.get("attn_layer_idx", ()):
            width = config["attn_cfg"]["num_heads"] * config["attn_cfg"]["head_dim"]
            shapes = {"in_proj.weight": (3 * width, d), "out_proj.weight": (d, width)}
            shapes |= {"conv1d.weight": (3 * width, 1, 4), "conv1d.bias": (3 * width,)}
        elif "dim" in config or config["ssm_cfg"].get("layer") == "Mamba2":
            shapes = {"in_proj.weight": (inner + joined + heads, d), "conv1d.weight": (joined, 1, 4)}
            shapes |= {"conv1d.bias": (joined,), "norm.weight": (inner,), "out_proj.weight": (d, inner)}
            shapes |= dict.fromkeys(("dt_bias", "A_log", "D"), (heads,))
        else:
            rank = -(-d // 16)
            shapes = {"in_proj.weight": (2 * inner, d), "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,)}
            shapes |= {"x_proj.weight": (rank + 32, inner), "dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,)}
            shapes |= {"A_log": (inner, 16), "D": (inner,), "out_proj.weight": (d, inner)}
        found.append({f"mixer.{name}": shape for name, shape in shapes.items()} | {"norm.weight": (d,)})
    return found


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_layouts(name: str, prefix: str, tmp_path: Path) -> None:
    """Pickled with a head that is the embedding (state-spaces), or in one file with a prefix or none (Codestral)."""
    config = ORIGINALS[name].config | ORIGINALS[name].small
    pickled = "dim" not in config
    if pickled and prefix:
        return
    multiple = config["pad_vocab_size_multiple"]
    rows, width = -(-config["vocab_size"] // multiple) * multiple, config.get("d_model", config.get("dim"))
    tensors = {
        f"{prefix}backbone.layers.{i}.{key}": torch.randn(shape) * 0.1
        for i, layer in enumerate(layers_of(config))
        for key, shape in layer.items()
    }
    embedding = torch.randn(rows, width)
    tensors |= {f"{prefix}backbone.embedding.weight": embedding, f"{prefix}backbone.norm_f.weight": torch.rand(width)}
    tensors[f"{prefix}lm_head.weight"] = embedding if pickled else torch.randn(rows, width)
    (tmp_path / ("config.json" if pickled else "params.json")).write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "consolidated.safetensors")
    model = load_pretrained(tmp_path, allow_pickle=pickled).eval()
    assert (model.lm_head.weight is model.backbone.embedding.weight) == pickled
    for i, layer in enumerate(layers_of(config)):
        if i not in config.get("attn_layer_idx", ()):
            for key in layer:
                found = model.backbone.layers[i].get_parameter(key)
                assert torch.equal(found, tensors[f"{prefix}backbone.layers.{i}.{key}"]), key
    with torch.no_grad():
        assert model(torch.randint(config["vocab_size"], (1, 9)))[0].isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_shrunk_as_transformers_computes_it(name: str, tmp_path: Path) -> None:
    """From what is in the repository: its configuration word by word, its names, its types."""
    config = MODELS[name].config | MODELS[name].small
    torch.manual_seed(len(name))
    text = json.dumps(config)
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    their_config = transformers.AutoConfig.from_pretrained(folder)
    theirs = families.randomise(getattr(transformers, config["architectures"][0])(their_config).float()).eval()
    with torch.no_grad():
        for key, x in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if not key.endswith(WIDE) and "inv_freq" not in key:
                x.copy_(x.bfloat16())
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    tensors = {key: x if key.endswith(WIDE) else x.bfloat16() for key, x in tensors.items()}
    plain = {re.sub(r"\.(layers|experts)\.\d+", r".\1.N", key) for key in tensors}
    assert plain <= TENSORS[config["model_type"]] and len(plain) > 8, "transformers has other names than published"
    save_file(tensors, folder / "model.safetensors")

    ours = load_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(config["vocab_size"], (2, 12))
    wanted = families.logits(theirs, tokens)
    with torch.no_grad():
        assert far(ours(tokens)[0], wanted) < CLOSE
        assert far(in_pieces(ours, tokens, [5]), wanted) < CLOSE

    kept = load_pretrained(folder).eval()
    for key, x in kept.named_parameters():
        assert x.dtype == (torch.float32 if key.endswith(WIDE) else torch.bfloat16), key
    with torch.no_grad():
        logits = kept(tokens)[0].float()
    assert ((logits - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("name", ["mistralai/Mamba-Codestral-7B-v0.1", "ibm-ai-platform/Bamba-9B-v1"])
def test_limits_of_steps_that_are_null_are_none(name: str, tmp_path: Path) -> None:
    config = MODELS[name].config | MODELS[name].small
    rest = {key: x for key, x in config.items() if key != "time_step_limit"}
    null, absent, other = (
        shape_of(tmp_path, rest | more).config
        for more in ({"time_step_limit": None}, {}, {"time_step_limit": [0.0, 0.5]})
    )
    assert null == absent != other
