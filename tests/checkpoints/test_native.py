"""Model folders: what is saved comes back; what is damaged or hostile gives one clear error, at little cost."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import longstate
from checkpoints.watch import copy_of, little
from longstate import LanguageModel

# Apart from the run-time checks, which would see an option of a wrong kind first.
pytestmark = pytest.mark.compiled

LAYERS = [
    "s4d",
    {"mixer": "s5", "d_state": 4},
    {"mixer": "mamba", "d_state": 2, "mlp": {"hidden": 8}},
    {"mixer": "mamba2", "head_dim": 4, "d_state": 3, "dt_limit": [0.0, 1.0]},
    {"mixer": "attention", "n_heads": 2, "window": 3},
]
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def model(**options: Any) -> LanguageModel:
    return LanguageModel(**(dict(vocab_size=11, d_model=8, layers=LAYERS, pad_vocab_size_multiple=4) | options))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    longstate.save(model(), folder)
    return folder


def refused(folder: Path, kinds: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)) -> str:
    """Load, and return the message with which that was refused."""
    with little(), pytest.raises(kinds) as caught:
        longstate.load(folder)
    message = str(caught.value)
    assert message and len(message) < 2000, message
    assert "\n" not in message, f"more than a line: {message}"
    return message


# ---- round trip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    first = model(tie_embeddings=tied, mlp={"hidden": 4}).to(dtype)
    longstate.save(first, tmp_path / "new" / "folder")
    second = longstate.load(tmp_path / "new" / "folder")
    assert second.config == first.config and json.loads(json.dumps(second.config)) == second.config
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, x in first.state_dict().items():
        y = second.state_dict()[name]
        assert y.dtype == dtype and torch.equal(x, y), name
    assert (second.lm_head.weight is second.backbone.embedding.weight) == tied
    marks = [{n: vars(p) for n, p in m.named_parameters()} for m in (first, second)]
    assert marks[0] == marks[1] and any(marks[0].values())
    tokens = torch.randint(11, (2, 9))
    assert torch.equal(first.eval()(tokens)[0], second.eval()(tokens)[0])
    assert all(p.requires_grad for p in second.parameters())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_another_type_on_loading(saved: Path) -> None:
    assert {p.dtype for p in longstate.load(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_saving_again_replaces_and_a_failed_save_leaves_what_was(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "a")
    other = model()
    longstate.save(other, folder)
    assert torch.equal(longstate.load(folder).lm_head.weight, other.lm_head.weight)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = model()
    broken.config["layers"] = object()  # no JSON
    with pytest.raises(TypeError):
        longstate.save(broken, folder)
    assert "config.json" in before and (folder / "config.json").read_bytes() == before["config.json"]
    assert sorted(before) == sorted(p.name for p in folder.iterdir()), "a temporary file was left"


# ---- damaged


def test_what_is_not_there(saved: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none", (FileNotFoundError,))
    for name in ("config.json", "model.safetensors"):
        folder = copy_of(saved, tmp_path / name)
        (folder / name).unlink()
        assert name in refused(folder, (FileNotFoundError,))
        (folder / name).mkdir()
        assert name in refused(folder)


def test_a_pickle_is_not_read(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    for name in ("config.json", "model.safetensors"):
        folder = copy_of(saved, tmp_path / name)
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        assert name in refused(folder)


@fuzz
@given(part=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_cut_short(saved: Path, tmp_path_factory: pytest.TempPathFactory, part: float, name: str) -> None:
    folder = copy_of(saved, tmp_path_factory.mktemp("cut"))
    content = (saved / name).read_bytes()
    whole = len(content.rstrip())
    (folder / name).write_bytes(content[: int(part * whole)])
    assert name in refused(folder)


@fuzz
@given(data=st.data(), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_flipped_bits(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    """A flip is refused, or gives a model; nothing else happens."""
    folder = copy_of(saved, tmp_path_factory.mktemp("flip"))
    content = bytearray((saved / name).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith("tensors") else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(bytes(content))
    loads_or_is_refused(folder)


def loads_or_is_refused(folder: Path) -> None:
    with little():
        try:
            loaded = longstate.load(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(error) and "\n" not in str(error)  # noqa: PT017
        else:
            assert isinstance(loaded, LanguageModel)


@fuzz
@given(content=st.binary(max_size=400), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_anything_else_in_a_file(saved: Path, tmp_path_factory: Any, content: bytes, name: str) -> None:
    folder = copy_of(saved, tmp_path_factory.mktemp("any"))
    (folder / name).write_bytes(content)
    assert name in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "not part"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(9)}), "shape"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(8, dtype=torch.int64)}), "type"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(8, dtype=torch.complex64)}), "type"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(())}), "shape"),
        (lambda t: t.clear(), "only 0 tensors"),
    ],
)
def test_other_tensors(saved: Path, tmp_path: Path, change: Callable[[dict], Any], message: str) -> None:
    folder = copy_of(saved, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert message in refused(folder)


def with_config(saved: Path, folder: Path, change: Callable[[dict], Any]) -> Path:
    folder = copy_of(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


HOSTILE: dict[str, Callable[[dict], Any]] = {
    "a huge vocabulary": lambda c: c.update(vocab_size=10**12),
    "a vocabulary beyond 64 bits": lambda c: c.update(vocab_size=10**30),
    "a huge width": lambda c: c.update(d_model=10**12),
    "huge states": lambda c: c["layers"].append({"mixer": "mamba", "d_state": 10**9}),
    "huge s4d states": lambda c: c["layers"].append({"mixer": "s4d", "d_state": 10**9}),
    "huge s5 states": lambda c: c["layers"].append({"mixer": "s5", "d_state": 10**9}),
    "huge heads": lambda c: c["layers"].append({"mixer": "attention", "head_dim": 10**12}),
    "a huge padding": lambda c: c.update(pad_vocab_size_multiple=10**15),
    "a huge mlp": lambda c: c.update(mlp={"hidden": 10**14}),
    "endless expansion": lambda c: c["layers"].append({"mixer": "mamba", "expand": 1e300}),
    "not a number": lambda c: c["layers"].append({"mixer": "mamba2", "expand": float("nan")}),
    "infinite": lambda c: c["layers"].append({"mixer": "mamba", "expand": float("inf")}),
    "many layers": lambda c: c.update(layers=["s5"] * 10**5),
    "half a million layers": lambda c: c.update(layers=["s5"] * 500_000),
    "a million layers": lambda c: c.update(layers=["mamba2"] * 10**6),
    "an unknown key": lambda c: c.update(vocabsize=3),
    "an unknown option": lambda c: c["layers"].append({"mixer": "mamba", "dstate": 3}),
    "an unknown mixer": lambda c: c["layers"].append("mambo"),
    "a missing key": lambda c: c.pop("d_model"),
    "another format": lambda c: c.update(format="other"),
    "another version": lambda c: c.update(version=2),
    "a short limit": lambda c: c["layers"].append({"mixer": "mamba2", "head_dim": 4, "dt_limit": []}),
    "a mapping as limit": lambda c: c["layers"].append({"mixer": "mamba2", "head_dim": 4, "dt_limit": {"a": 1}}),
    "words as limit": lambda c: c["layers"].append({"mixer": "mamba2", "head_dim": 4, "dt_limit": ["a", "b"]}),
    "no heads": lambda c: c["layers"].append({"mixer": "mamba2", "head_dim": 0}),
    "no head channels": lambda c: c["layers"].append({"mixer": "attention", "n_heads": 1, "head_dim": 0}),
    "negative head channels": lambda c: c["layers"].append({"mixer": "attention", "n_heads": 1, "head_dim": -2}),
    "a rank of zero": lambda c: c["layers"].append({"mixer": "mamba", "dt_rank": 0}),
    "negative groups": lambda c: c["layers"].append({"mixer": "mamba2", "head_dim": 4, "n_groups": -1}),
    "no norm groups": lambda c: c["layers"].append({"mixer": "mamba2", "head_dim": 4, "norm_groups": 0}),
    "half a width": lambda c: c.update(d_model=8.5),
    "a word as width": lambda c: c.update(d_model="8"),
    "nothing as width": lambda c: c.update(d_model=None),
    "a negative width": lambda c: c.update(d_model=-8),
    "layers as a word": lambda c: c.update(layers="mamba"),
    "layers as a number": lambda c: c.update(layers=3),
    "a layer of lists": lambda c: c.update(layers=[[["mixer", "mamba"]]]),
    "a layer of nothing": lambda c: c.update(layers=[None]),
    "an mlp of lists": lambda c: c.update(mlp=[1, 2]),
    "an mlp of words": lambda c: c.update(mlp="big"),
    "an mlp in a layer of words": lambda c: c["layers"].append({"mixer": "mamba", "mlp": "big"}),
    "deeply nested": lambda c: c["layers"].append(nested(500)),
    "a word as epsilon": lambda c: c.update(norm_eps="small"),
    "a word as switch": lambda c: c.update(tie_embeddings="no"),
    "a word as residual": lambda c: c.update(residual_in_fp32="false"),
}


def nested(depth: int) -> Any:
    value: Any = "mamba"
    for _ in range(depth):
        value = {"mixer": value}
    return value


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_configuration(saved: Path, tmp_path: Path, kind: str) -> None:
    message = refused(with_config(saved, tmp_path / "a", HOSTILE[kind]))
    assert "config.json" in message or "model.safetensors" in message


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"x"', "", "{}", "[" * 100_000, "{" * 9, '{"format": "longstate"', "9" * 5000, "\udcff"]
)
def test_other_json(saved: Path, tmp_path: Path, text: str) -> None:
    folder = copy_of(saved, tmp_path / "a")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json" in refused(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**13), 10**13) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = ["vocab_size", "d_model", "layers", "mlp", "pad_vocab_size_multiple", "norm_eps", "tie_embeddings", "new"]
OPTIONS = [
    "d_state",
    "expand",
    "d_conv",
    "head_dim",
    "dt_limit",
    "n_groups",
    "norm_groups",
    "mlp",
    "bias",
    "dt_min",
    "n_heads",
]


@fuzz
@given(name=st.sampled_from(ENTRIES), value=json_values)
def test_nested_garbage(saved: Path, tmp_path_factory: Any, name: str, value: Any) -> None:
    folder = with_config(saved, tmp_path_factory.mktemp("garbage"), lambda c: c.update({name: value}))
    loads_or_is_refused(folder)


@settings(fuzz, max_examples=150)
@given(
    mixer=st.sampled_from(["s4d", "s5", "mamba", "mamba2", "attention"]),
    options=st.dictionaries(
        st.sampled_from([*OPTIONS, "window", "rotary_dim", "n_blocks"]), json_values, min_size=1, max_size=1
    ),
)
def test_garbage_in_a_layer(saved: Path, tmp_path_factory: Any, mixer: str, options: dict[str, Any]) -> None:
    layer = {"mixer": mixer, **options}
    folder = with_config(saved, tmp_path_factory.mktemp("layer"), lambda c: c["layers"].append(layer))
    loads_or_is_refused(folder)


def test_a_mile_of_configuration_is_not_read(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "a")
    (folder / "config.json").write_bytes(b" " * (5 * 2**20) + b"{}")
    assert "bytes" in refused(folder)


def test_the_watch_sees() -> None:
    with pytest.raises(AssertionError, match="made"), little():
        torch.empty(20 * 2**20)
    with pytest.raises(AssertionError, match="by Python"), little():
        bytes(60 * 2**20)
