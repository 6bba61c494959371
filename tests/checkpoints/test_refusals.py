"""Damaged or hostile published folders, and what we or a family do not compute: one clear error, at little cost."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from checkpoints import families  # noqa: E402
from checkpoints.watch import copy_of, little  # noqa: E402
from longstate import LanguageModel  # noqa: E402
from longstate.checkpoints import load_pretrained, save  # noqa: E402

# Apart from the run-time checks, which would see an option of a wrong kind first.
pytestmark = pytest.mark.compiled

fuzz = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
NAMES = sorted(families.FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each family."""
    root = tmp_path_factory.mktemp("published")
    for name in NAMES:
        families.write(name, 3, root / name)
    return root


def refused(folder: Path, **options: Any) -> str:
    """Load, and return the message with which that was refused."""
    with little(), pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pretrained(folder, **options)
    message = str(caught.value)
    assert message and len(message) < 2000 and "\n" not in message, message
    return message


def loads_or_is_refused(folder: Path) -> None:
    with little():
        try:
            model = load_pretrained(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(error) and "\n" not in str(error), str(error)  # noqa: PT017
        else:
            assert isinstance(model, LanguageModel) and not any(p.is_meta for p in model.parameters())


def changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    folder = copy_of(folder, target)
    config = families.config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- damaged


def test_what_is_not_there(folders: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none")
    assert "no configuration" in refused(tmp_path)
    folder = copy_of(folders / "mamba", tmp_path / "a")
    assert "not a folder" in refused(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(folder)
    (folder / "model.safetensors").mkdir()
    assert "not a file" in refused(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "not there"),
        ({"weight_map": {"a": "../mamba/model.safetensors"}}, "no name of a file"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no name of a file"),
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "is in one.safetensors and in two"),
    ],
)
def test_a_bad_index(folders: Path, tmp_path: Path, index: dict[str, Any], message: str) -> None:
    folder = copy_of(folders / "mamba", tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refused(folder)


@fuzz
@given(data=st.data(), part=st.floats(0, 1, exclude_max=True))
def test_cut_short(folders: Path, tmp_path_factory: Any, data: Any, part: float) -> None:
    folder = copy_of(folders / data.draw(st.sampled_from(NAMES)), tmp_path_factory.mktemp("cut"))
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(part * len(content))])
    assert path.name in refused(folder)


@settings(fuzz, max_examples=80)
@given(data=st.data())
def test_flipped_bits(folders: Path, tmp_path_factory: Any, data: Any) -> None:
    """A flip is refused, or gives a model; nothing else happens."""
    folder = copy_of(folders / data.draw(st.sampled_from(NAMES)), tmp_path_factory.mktemp("flip"))
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    loads_or_is_refused(folder)


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_other_tensors(folders: Path, tmp_path_factory: Any, data: Any) -> None:
    name = data.draw(st.sampled_from(NAMES))
    folder = copy_of(folders / name, tmp_path_factory.mktemp("tensors"))
    tensors = load_file(folder / "model.safetensors")
    chosen = data.draw(st.sampled_from(sorted(tensors)))
    x = tensors[chosen]
    what = data.draw(st.sampled_from(["missing", "extra", "shape", "longer", "flat", "scalar", "type", "eight bits"]))
    tied = families.config_of(folder).get("tie_word_embeddings", True)
    if what == "missing":
        tensors.pop(chosen)
    elif what == "extra":
        tensors[chosen + ".more"] = x.clone()
    elif what == "type":
        tensors[chosen] = x.to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.complex64])))
    elif what == "eight bits":
        tensors[chosen] = x.to(torch.float8_e4m3fn)
    else:
        shapes = {"shape": x[None], "longer": torch.cat([x, x]), "flat": x[:-1], "scalar": torch.zeros(())}
        tensors[chosen] = shapes[what].clone()
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder)
    wanted = {"missing": "missing", "extra": "not part", "type": "of type", "eight bits": "of type"}
    assert wanted.get(what, "has shape") in message, (message, chosen, tied)
    assert chosen.rsplit(".layers.")[-1] in message or what == "extra"


def test_a_head_that_is_not_the_embedding(folders: Path, tmp_path: Path) -> None:
    folder = changed(folders / "mamba", tmp_path / "a", lambda c: c.update(tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert load_pretrained(folder).config["tie_embeddings"]
    tensors["lm_head.weight"][1, 2] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert "is the embedding" in refused(folder)


# ---- hostile configurations

HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a billion layers": lambda c: c.update(num_hidden_layers=10**9, layer_types=None, layers_block_type=None),
    "minus one layer": lambda c: c.update(num_hidden_layers=-1, layers_block_type=None),
    "a pattern of a million": lambda c: c.update(
        num_hidden_layers=10**6, layer_types=["mamba"] * 10**5, hybrid_override_pattern="M" * 10**5,
        layers_block_type=["mamba"] * 10**5,
    ),
    "a huge vocabulary": lambda c: c.update(vocab_size=10**12),
    "a vocabulary beyond 64 bits": lambda c: c.update(vocab_size=10**30),
    "a huge width": lambda c: c.update(hidden_size=10**12),
    "no width": lambda c: c.update(hidden_size=0),
    "half a width": lambda c: c.update(hidden_size=8.5),
    "a word as width": lambda c: c.update(hidden_size="8"),
    "no number as width": lambda c: c.update(hidden_size=float("nan")),
    "null as width": lambda c: c.update(hidden_size=None),
    "a list as width": lambda c: c.update(hidden_size=[8]),
    "quantised": lambda c: c.update(quantization_config={"bits": 4}),
    "quantised inside": lambda c: c.update(text={"deep": [{"quantization_config": {"quant_method": "fp8"}}]}),
    "another family": lambda c: c.update(model_type="llama"),
    "a family misspelt": lambda c: c.update(model_type="mamba3"),
    "no family": lambda c: c.pop("model_type"),
    "a family of lists": lambda c: c.update(model_type=["mamba"]),
    "a word as switch": lambda c: c.update(tie_word_embeddings="no"),
    "deeply nested": lambda c: c.update(more=nested(300), quantization_config=nested(300)),
}  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": [value]}
    return value


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_configuration(folders: Path, tmp_path: Path, kind: str) -> None:
    for name in NAMES:
        folder = changed(folders / name, tmp_path / name, HOSTILE[kind])
        message = refused(folder)
        assert "config.json" in message or "model.safetensors" in message, message


SIZES = [10**9, 10**13, 10**30, -1, 0]


@settings(fuzz, max_examples=120)
@given(data=st.data())
def test_any_option_of_any_size(folders: Path, tmp_path_factory: Any, data: Any) -> None:
    """Absurd numbers where numbers stand."""
    name = data.draw(st.sampled_from(NAMES))
    config = families.config_of(folders / name)
    key = data.draw(st.sampled_from([k for k, v in config.items() if isinstance(v, int | float)]))
    folder = changed(
        folders / name, tmp_path_factory.mktemp("size"), lambda c: c.update({key: data.draw(st.sampled_from(SIZES))})
    )
    loads_or_is_refused(folder)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**13), 10**13) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(fuzz, max_examples=150)
@given(data=st.data(), value=values)
def test_any_option_of_any_kind(folders: Path, tmp_path_factory: Any, data: Any, value: Any) -> None:
    name = data.draw(st.sampled_from(NAMES))
    key = data.draw(st.sampled_from(sorted(families.config_of(folders / name))))
    loads_or_is_refused(changed(folders / name, tmp_path_factory.mktemp("kind"), lambda c: c.update({key: value})))


@fuzz
@given(data=st.data(), value=values)
def test_original_layouts_of_any_kind(folders: Path, tmp_path_factory: Any, data: Any, value: Any) -> None:
    tensors = load_file(folders / "mamba2" / "model.safetensors")
    folder = tmp_path_factory.mktemp("original")
    save_file(tensors, folder / "model.safetensors")
    save_file(tensors, folder / "consolidated.safetensors")
    mixer = {"layer": data.draw(st.sampled_from(["Mamba1", "Mamba2"])), "d_state": 4, "headdim": 4}
    config = {"d_model": 8, "n_layer": 2, "vocab_size": 17, "ssm_cfg": mixer, "attn_cfg": {}, "attn_layer_idx": [1]}
    inner = data.draw(st.sampled_from(["ssm_cfg", "attn_cfg", "", "params"]))
    if inner == "params":
        config = {"dim": 8, "n_layers": 2, "vocab_size": 17, "n_groups": 1}
    target: Any = config[inner] if inner in config else config
    keys = sorted(config) + (["num_heads", "d_conv", "dt_limit", "head_dim", "d_ssm", "causal"] if inner else [])
    target[data.draw(st.sampled_from(keys))] = value
    (folder / ("params.json" if inner == "params" else "config.json")).write_text(json.dumps(config))
    loads_or_is_refused(folder)


@fuzz
@given(content=st.binary(max_size=300))
def test_anything_as_a_pickle(folders: Path, tmp_path_factory: Any, content: bytes) -> None:
    folder = copy_of(folders / "mamba", tmp_path_factory.mktemp("pickle"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refused(folder, allow_pickle=True)


def test_a_pickle_runs_nothing(folders: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    folder = copy_of(folders / "mamba", tmp_path / "a")
    (folder / "model.safetensors").unlink()
    for content in (Bomb(), {"a": Bomb()}, {"a": torch.zeros(3), "b": 3}, [torch.zeros(3)]):
        torch.save(content, folder / "pytorch_model.bin")
        assert "pytorch_model.bin" in refused(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "nothing else" in refused(folder, allow_pickle=True)


# ---- what we do not compute

OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("mamba", {"hidden_act": "relu"}, "hidden_act"),
    ("mamba2", {"hidden_act": "gelu"}, "hidden_act"),
    ("jamba", {"hidden_act": "gelu"}, "hidden_act"),
    ("bamba", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ("bamba", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type"),
    ("bamba", {"mamba_d_head": 7}, "mamba_d_head"),
    ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types"),
    ("granitemoehybrid", {"layer_types": ["mambo"] * 4}, "mambo"),
    ("nemotron_h", {"mlp_hidden_act": "tanh"}, "mlp_hidden_act"),
    ("nemotron_h", {"mamba_hidden_act": "relu"}, "mamba_hidden_act"),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
    ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation"),
    ("recurrent_gemma", {"block_types": ["conv"]}, "block_types"),
    ("lfm2", {"rope_scaling": {"rope_type": "llama3"}}, "rope_type"),
    ("lfm2", {"block_use_swiglu": False}, "block_use_swiglu"),
]


@pytest.mark.parametrize(("name", "options", "message"), OTHERS)
def test_options_that_we_do_not_compute(
    folders: Path, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    found = refused(changed(folders / name, tmp_path / "a", lambda c: c.update(options)))
    assert message in found and "config.json" in found


MAMBA2: dict[str, Any] = {"mixer": "mamba2", "head_dim": 4, "d_state": 2}
BLOCK: dict[str, Any] = {"mlp": {"hidden": 4}}
EXPORTS: list[tuple[str, dict[str, Any], str]] = [
    ("mamba", {"layers": [MAMBA2]}, "mixer is 'mamba2'"),
    ("mamba", {"layers": [{"mixer": "mamba", "inner_norm": "plain"}]}, "inner_norm"),
    ("mamba", {"layers": ["mamba", {"mixer": "mamba", "expand": 1.5}]}, "intermediate_size"),
    ("mamba", {"layers": ["mamba", {"mixer": "mamba", "d_state": 4}]}, "state_size"),
    ("mamba", {"layers": ["mamba"], **BLOCK}, "mlp is 'gated'"),
    ("mamba", {"layers": ["mamba"], "residual_multiplier": 0.5}, "residual_multiplier"),
    ("mamba", {"layers": ["mamba"], "logits_soft_cap": 2.0}, "logits_soft_cap"),
    ("falcon_mamba", {"layers": ["mamba"]}, "inner_norm"),
    ("mamba2", {"layers": [{**MAMBA2, "norm_eps": 1e-3}]}, "layer_norm_epsilon"),
    ("mamba2", {"layers": [{**MAMBA2, "gated_norm": False}]}, "gated_norm"),
    ("mamba2", {"layers": [{**MAMBA2, "d_ssm": 8}]}, "d_ssm"),
    ("mamba2", {"layers": [{**MAMBA2, "d_inner": 12}]}, "d_inner"),
    ("jamba", {"layers": [{"mixer": "mamba", "inner_norm": "weighted"}], **BLOCK}, "rms_norm_eps"),
    ("jamba", {"layers": [{"mixer": "attention", "n_heads": 2}], **BLOCK}, "rotary_dim"),
    ("bamba", {"layers": [{"mixer": "attention", "n_heads": 2, "window": 4}], **BLOCK}, "window"),
    ("bamba", {"layers": [MAMBA2]}, "mlp is None"),
    ("granitemoehybrid", {"layers": [{"mixer": "attention", "n_heads": 1, "rotary_dim": 4}], **BLOCK}, "rotary_dim"),
    ("nemotron_h", {"layers": [MAMBA2], **BLOCK}, "mlp is 'gated'"),
    ("nemotron_h", {"layers": [{**MAMBA2, "mlp": {"kind": "plain", "activation": "relu2"}}]}, "mixer and mlp"),
    ("nemotron_h", {"layers": [{**MAMBA2, "dt_limit": [0.0, 1.0]}]}, "dt_limit"),
    ("nemotron_h", {"layers": [MAMBA2]}, "tie_embeddings"),
    ("recurrent_gemma", {"layers": ["rglru"], "mlp": {"hidden": 4, "bias": True}}, "activation"),
    ("lfm2", {"layers": [{"mixer": "attention", "n_heads": 2}], **BLOCK}, "qk_norm"),
    ("state-spaces", {"layers": ["mamba"]}, "no such family to write"),
    ("mambo", {"layers": ["mamba"]}, "Did you mean 'mamba'"),
]


@pytest.mark.parametrize(("name", "options", "message"), EXPORTS)
def test_what_a_family_has_no_place_for(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^save\(family=") as caught:
        save(LanguageModel(11, 8, **options), tmp_path / "a", family=name)
    assert message in str(caught.value)
    assert not (tmp_path / "a").exists(), "half a folder was written"


def test_the_watch_sees() -> None:
    with pytest.raises(AssertionError, match="made"), little():
        torch.empty(20 * 2**20)
    with pytest.raises(AssertionError, match="by Python"), little():
        bytes(60 * 2**20)


# ---- memory

PEAK = """
import sys, torch
torch.set_num_threads(1)
import longstate
def peak(): return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
longstate.load_pretrained(sys.argv[2])  # what is imported on the way
before = peak()
model = longstate.load_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3], None), allow_pickle=True)
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("layout", "dtype"), [("one", ""), ("several", "bfloat16"), ("pickle", "bfloat16")])
def test_memory_holds_the_model_once(folders: Path, tmp_path: Path, layout: str, dtype: str) -> None:
    config = transformers.MambaConfig(vocab_size=40000, hidden_size=512, num_hidden_layers=8)
    theirs = transformers.MambaForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size="30MB" if layout == "several" else "1GB")
    if layout == "pickle":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(folders / "mamba"), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size = map(int, run.stdout.split())
    assert size > 60 * 2**20 and grown < size + 12 * 2**20, f"{grown} bytes for a model of {size}"
