"""Other layouts of the same models: original names, older and newer words, several files, pickles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

transformers = pytest.importorskip("transformers")

import longstate  # noqa: E402
from checkpoints import families  # noqa: E402
from longstate.checkpoints import load_pretrained, published, save  # noqa: E402

Tensors = dict[str, torch.Tensor]


def put(folder: Path, config: dict[str, Any], tensors: Tensors, name: str = "config.json") -> Path:
    """Write a folder as somebody else would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    weights = "model.safetensors" if name == "config.json" else "consolidated.safetensors"
    save_file({key: x.contiguous() for key, x in tensors.items()}, folder / weights)
    return folder


def same(one: longstate.LanguageModel, other: longstate.LanguageModel) -> None:
    """Check that two models compute the same, to the last bit."""
    tokens = torch.randint(min(one.vocab_size, other.vocab_size), (2, 9))
    with torch.no_grad():
        x, y = one.eval()(tokens)[0], other.eval()(tokens)[0]
    assert torch.equal(x, y) and x.std() > 0.01


def published_model(name: str, folder: Path, seed: int = 3) -> tuple[longstate.LanguageModel, dict[str, Any], Tensors]:
    """Let transformers write a model; return ours, its configuration and its tensors."""
    families.write(name, seed, folder)
    tensors = load_file(folder / "model.safetensors")
    return load_pretrained(folder), json.loads((folder / "config.json").read_text()), tensors


def original(tensors: Tensors) -> Tensors:
    """Return the names of the state-spaces organisation."""
    return {name.replace("backbone.embeddings.", "backbone.embedding."): x for name, x in tensors.items()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_layout_of_state_spaces(name: str, seed: int, tmp_path: Path) -> None:
    ours, theirs, tensors = published_model(name, tmp_path / "a", seed)
    config = getattr(transformers, families.FAMILIES[name][0]).config_class.from_pretrained(tmp_path / "a")
    rows = -(-config.vocab_size // 8) * 8
    tensors = original(tensors)
    for key in ("backbone.embedding.weight", "lm_head.weight"):  # rows beyond the vocabulary, as published
        if key in tensors:
            tensors[key] = torch.cat([tensors[key], torch.randn(rows - config.vocab_size, config.hidden_size)])
    tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"].clone())  # there though it is tied
    mixer = dict(d_state=config.state_size, d_conv=config.conv_kernel, expand=config.expand, bias=config.use_bias)
    mixer |= dict(conv_bias=config.use_conv_bias)
    if name == "mamba":
        mixer |= dict(expand=(config.intermediate_size + 0.5) / config.hidden_size)  # the whole part of their product
        mixer |= dict(dt_rank=config.time_step_rank)
    else:
        mixer |= dict(layer="Mamba2", headdim=config.head_dim, ngroups=config.n_groups)
        mixer |= dict(dt_limit=list(config.time_step_limit))
    settings = dict(d_model=config.hidden_size, n_layer=config.num_hidden_layers, vocab_size=config.vocab_size)
    settings |= dict(ssm_cfg=mixer, rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
    settings |= dict(tie_embeddings=config.tie_word_embeddings)
    if config.layer_norm_epsilon != 1e-5:  # the original has no other
        config.layer_norm_epsilon = 1e-5
        theirs |= {"layer_norm_epsilon": 1e-5}
        (tmp_path / "a" / "config.json").write_text(json.dumps(theirs))
        ours = load_pretrained(tmp_path / "a")
    found = load_pretrained(put(tmp_path / "b", settings, tensors))
    assert found.lm_head.weight.shape[0] == rows
    tokens = torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        assert torch.equal(found.eval()(tokens)[0][..., : config.vocab_size], ours.eval()(tokens)[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_layout_of_codestral(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    config = transformers.Mamba2Config(
        vocab_size=24, hidden_size=256, num_hidden_layers=2, num_heads=8, head_dim=64, n_groups=[1, 2, 4, 8][seed]
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "a")
    ours = load_pretrained(tmp_path / "a")
    tensors = {f"model.{name}": x for name, x in original(load_file(tmp_path / "a" / "model.safetensors")).items()}
    params = dict(dim=256, n_layers=2, vocab_size=24, n_groups=config.n_groups, rms_norm=True, residual_in_fp32=True)
    params |= dict(fused_add_norm=True, pad_vocab_size_multiple=1, tie_embeddings=False, model_type="mamba")
    folder = put(tmp_path / "b", params, tensors, "params.json")
    same(load_pretrained(folder), ours)
    # Both configurations, the weights of one: as in its repository when only these were fetched.
    (folder / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    same(load_pretrained(folder), ours)


def rotated(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Return heads ``[t h p]`` with their first channels rotated by the position, as complex numbers."""
    half = channels // 2
    angle = torch.arange(len(x))[:, None, None] * 10000.0 ** -(torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:channels]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[..., channels:]], -1)


def attention(x: torch.Tensor, tensors: Tensors, heads: int, kv_heads: int, p: int, rotary: int) -> torch.Tensor:
    """Attention of the hybrids of mamba_ssm, written out: one projection, a convolution over all, halves rotated."""
    qkv = functional.linear(x, tensors["in_proj.weight"], tensors.get("in_proj.bias"))
    if "conv1d.weight" in tensors:
        weight = tensors["conv1d.weight"]
        padded = functional.pad(qkv.T, (weight.shape[-1] - 1, 0))
        qkv = functional.conv1d(padded, weight, tensors["conv1d.bias"], groups=len(weight)).T
    q, k, v = (y.unflatten(-1, (-1, p)) for y in qkv.split([heads * p, kv_heads * p, kv_heads * p], -1))
    q, k = rotated(q, rotary), rotated(k, rotary)
    k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
    scores = torch.einsum("thp,shp->hts", q, k) / math.sqrt(p)
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    y = torch.einsum("hts,shp->thp", scores.softmax(-1), v).flatten(1)
    return functional.linear(y, tensors["out_proj.weight"], tensors.get("out_proj.bias"))


@pytest.mark.parametrize("seed", range(8))
def test_hybrids_of_state_spaces(seed: int, tmp_path: Path) -> None:
    """Layers of attention and MLPs against the formulas of mamba_ssm, written out; there is no other implementation."""
    draw = families.Draw(seed)
    torch.manual_seed(seed)
    width, p, kv_heads = 12, draw.choice([4, 6]), draw.choice([1, 2])
    heads, rotary, taps = kv_heads * draw.choice([1, 2]), draw.choice([0, 2, 4]), draw.choice([0, 4])
    bias, inner = draw.random() < 0.5, draw.choice([0, 5])
    joined, hidden = (heads + 2 * kv_heads) * p, 128  # rounded up
    shapes: dict[str, tuple[int, ...]] = {"in_proj.weight": (joined, width), "out_proj.weight": (width, heads * p)}
    if bias:
        shapes |= {"in_proj.bias": (joined,), "out_proj.bias": (width,)}
    if taps:
        shapes |= {"conv1d.weight": (joined, 1, taps), "conv1d.bias": (joined,)}
    mlp = {"fc1.weight": (2 * hidden, width), "fc2.weight": (width, hidden)} if inner else {}
    tensors = {"backbone.embedding.weight": torch.randn(16, width), "backbone.norm_f.weight": torch.rand(width) + 0.5}
    for i in range(2):
        for start, group in (("mixer.", shapes), ("mlp.", mlp)):
            for name, shape in group.items():
                tensors[f"backbone.layers.{i}.{start}{name}"] = torch.randn(shape) * 0.3
        for name in ("norm.weight", "norm2.weight") if inner else ("norm.weight",):
            tensors[f"backbone.layers.{i}.{name}"] = torch.rand(width) + 0.5
    cfg = dict(causal=True, d_conv=taps, head_dim=p, num_heads=heads, out_proj_bias=bias, qkv_proj_bias=bias)
    cfg |= dict(rotary_emb_dim=rotary, num_heads_kv=kv_heads)
    config = dict(d_model=width, n_layer=2, vocab_size=13, attn_layer_idx=[0, 1], attn_cfg=cfg, ssm_cfg={})
    config |= dict(d_intermediate=inner) if inner else {}
    ours = load_pretrained(put(tmp_path, config, tensors)).eval()

    tokens = torch.randint(13, (1, 7))
    x = tensors["backbone.embedding.weight"][tokens[0]]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * tensors[name]

    for i in range(2):
        layer = f"backbone.layers.{i}."
        part = {name: tensors[f"{layer}mixer.{name}"] for name in shapes}
        x = x + attention(norm(x, f"{layer}norm.weight"), part, heads, kv_heads, p, rotary)
        if inner:
            y, gate = (norm(x, f"{layer}norm2.weight") @ tensors[f"{layer}mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (y * functional.silu(gate)) @ tensors[f"{layer}mlp.fc2.weight"].T
    wanted = norm(x, "backbone.norm_f.weight") @ tensors["backbone.embedding.weight"].T
    with torch.no_grad():
        got = ours(tokens)[0][0]
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def old_rotary(config: dict[str, Any]) -> None:
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None


def stacked(tensors: Tensors, block: str, names: list[str], target: str) -> None:
    """Make one tensor of the experts of every layer, as transformers has them in memory."""
    layers = {name.split(f".{block}.")[0] for name in tensors if f".{block}.experts.0." in name}
    for layer in layers:
        parts = []
        for name in names:
            found = [key for key in tensors if key.startswith(f"{layer}.{block}.experts.") and key.endswith(name)]
            found.sort(key=lambda key: int(key.split(".experts.")[1].split(".")[0]))
            parts.append(torch.stack([tensors.pop(key) for key in found]))
        tensors[f"{layer}.{block}.experts.{target}"] = torch.cat(parts, 1)


def jamba_stacked(config: dict[str, Any], tensors: Tensors) -> None:
    stacked(tensors, "feed_forward", ["gate_proj.weight", "up_proj.weight"], "gate_up_proj")
    stacked(tensors, "feed_forward", ["down_proj.weight"], "down_proj")
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)


def granite_stacked(config: dict[str, Any], tensors: Tensors) -> None:
    words = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
    for name in list(tensors):
        for old, new in (words | {"router.layer.weight": "router.weight"}).items():
            if f"block_sparse_moe.{old}" in name:
                tensors[name.replace(old, new)] = tensors.pop(name)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    config["layers_block_type"] = config.pop("layer_types")


def nemotron_stacked(config: dict[str, Any], tensors: Tensors) -> None:
    stacked(tensors, "mixer", ["up_proj.weight"], "up_proj")
    stacked(tensors, "mixer", ["down_proj.weight"], "down_proj")
    for name in list(tensors):
        tensors[name.replace("backbone.", "model.")] = tensors.pop(name)
    assert any(name.endswith("experts.up_proj") and name.startswith("model.") for name in tensors)
    tensors["mtp.layers.0.norm.weight"] = torch.ones(3)


def nemotron_words(config: dict[str, Any], tensors: Tensors) -> None:
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    config["hybrid_override_pattern"] = "".join(letters[x] for x in config.pop("layers_block_type"))
    config["attention_head_dim"] = config.pop("head_dim")
    config["mamba_d_conv"] = config.pop("conv_kernel")


def nemotron_old_words(config: dict[str, Any], tensors: Tensors) -> None:
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layers_block_type"] = [words.get(x, x) for x in config["layers_block_type"]]


def gemma_words(config: dict[str, Any], tensors: Tensors) -> None:
    old_rotary(config)
    config["_block_types"] = config.pop("block_types")
    config["partial_rotary_factor"] = 0.5


def lfm2_words(config: dict[str, Any], tensors: Tensors) -> None:
    old_rotary(config)
    types = config.pop("layer_types")
    config["full_attn_idxs"] = [i for i, x in enumerate(types) if x == "full_attention"]
    config["block_ff_dim"] = config.pop("intermediate_size")
    config["tie_embedding"] = config.pop("tie_word_embeddings", True)


def with_buffers(config: dict[str, Any], tensors: Tensors) -> None:
    old_rotary(config)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(3)


def embedding_of_the_original(config: dict[str, Any], tensors: Tensors) -> None:
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mamba", embedding_of_the_original),
        ("falcon_mamba", embedding_of_the_original),
        ("jamba", jamba_stacked),
        ("bamba", with_buffers),
        ("granitemoehybrid", granite_stacked),
        ("nemotron_h", nemotron_stacked),
        ("nemotron_h", nemotron_words),
        ("nemotron_h", nemotron_old_words),
        ("recurrent_gemma", gemma_words),
        ("lfm2", lfm2_words),
    ],
)
def test_older_and_newer_words(name: str, change: Callable[[Any, Tensors], None], tmp_path: Path) -> None:
    for seed in range(50, 80):  # the first whose experts are several, and whose options are not the defaults
        ours, config, tensors = published_model(name, tmp_path / str(seed), seed)
        if (name != "jamba" or any(".experts.1." in x for x in tensors)) and (
            name != "granitemoehybrid" or any("block_sparse" in x for x in tensors)
        ):
            break
    before = (dict(config), dict(tensors))
    change(config, tensors)
    assert before != (config, tensors), "nothing changed"
    same(load_pretrained(put(tmp_path / "b", config, tensors)), ours)


def test_several_files(tmp_path: Path) -> None:
    model = families.build("jamba", 3)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size=1500)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    same(load_pretrained(tmp_path / "many"), load_pretrained(tmp_path / "one"))


def test_pickles_only_when_asked_for(tmp_path: Path) -> None:
    ours, config, tensors = published_model("mamba", tmp_path / "a")
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    # Tensors that share a storage, begin inside it, or are of another type.
    wide = dict(tensors)
    first = sorted(wide)[0]
    storage = torch.cat([torch.zeros(5), wide[first].flatten()])
    wide[first] = storage[5:].view(wide[first].shape)
    torch.save(wide, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load_pretrained(folder)
    same(load_pretrained(folder, allow_pickle=True), ours)
    half = load_pretrained(folder, allow_pickle=True, dtype=torch.bfloat16)
    assert torch.equal(half.backbone.embedding.weight, ours.backbone.embedding.weight.to(torch.bfloat16))

    names = sorted(wide)
    parts = {"pytorch_model-1.bin": names[:4], "pytorch_model-2.bin": names[4:]}
    (folder / "pytorch_model.bin").unlink()
    for file, some in parts.items():
        torch.save({name: wide[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(load_pretrained(folder, allow_pickle=True), ours)


def test_our_own_folders_too(tmp_path: Path) -> None:
    model = longstate.LanguageModel(20, 8, ["mamba", "s5", {"mixer": "attention", "n_heads": 2}])
    save(model, tmp_path)
    same(load_pretrained(tmp_path), model)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "longstate" and content["architectures"] == ["LongstateForCausalLM"]


def test_types_in_one_file_may_differ(tmp_path: Path) -> None:
    """What meets activations gets one type; what a mixer takes to float32 itself keeps its own."""
    _, config, tensors = published_model("mamba2", tmp_path / "a")
    mixed = {
        name: x if name.endswith(("A_log", "D", "dt_bias", "norm.weight")) else x.to(torch.bfloat16)
        for name, x in tensors.items()
    }
    model = load_pretrained(put(tmp_path / "b", config, mixed))
    for name, x in model.named_parameters():
        wide = name.endswith(("A_log", ".D", "dt_bias"))
        assert x.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert model(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()


def test_a_hub_when_there_is_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    ours, _, _ = published_model("mamba", tmp_path / "a")
    asked: list[tuple[str, str | None, list[str]]] = []

    def fetch(name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / "a")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    same(load_pretrained("someone/model", revision="v1"), ours)
    assert [x[:2] for x in asked] == [("someone/model", "v1")]
    assert not any("bin" in pattern for pattern in asked[0][2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "a").rename(tmp_path / "someone" / "model")
    same(load_pretrained("someone/model"), ours)
    assert len(asked) == 1, "a folder that is there goes first"

    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"not fetched from a hub \(no route to host\)"):
        load_pretrained("someone/other")
    with pytest.raises(FileNotFoundError, match="no name of a repository"):
        load_pretrained("not/a/repository")


def test_companions_go_along(tmp_path: Path) -> None:
    published_model("mamba", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "secret.json").write_text("{}")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (tmp_path / "a" / "generation_config.json").unlink()
    assert published.carry(tmp_path / "a", tmp_path / "b") == ["tokenizer.json", "generation_config.json"]
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": 7}
