"""States: chosen, joined, stored; and what is not a state of this model is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from longstate import S4D, Attention, LanguageModel, Mamba, state

LAYERS = [
    {"mixer": "s5", "d_state": 4},
    {"mixer": None, "mlp": {"hidden": 4}},
    {"mixer": "mamba", "d_state": 2},
    {"mixer": "attention", "n_heads": 2},
]


def model(layers: Any = LAYERS, d_model: int = 8) -> LanguageModel:
    return LanguageModel(11, d_model, layers)


def read(length: int = 5, batch: int = 3) -> tuple[LanguageModel, Any]:
    language_model = model()
    with torch.no_grad():
        return language_model, language_model(torch.randint(11, (batch, length)))[1]


def leaves(x: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(x)


def test_a_model_s_state_in_a_file(tmp_path: Path) -> None:
    language_model, given_state = read()
    path = tmp_path / "s.safetensors"
    state.save(given_state, path, {"note": "x"})
    loaded = state.load(path, language_model.initial_state(1))
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves(loaded), leaves(given_state), strict=True)
    )
    assert [type(x) for x in loaded] == [type(x) for x in given_state]
    assert state.load_metadata(path) == {"format": "longstate-state", "note": "x"}
    tokens = torch.randint(11, (3, 4))
    assert torch.equal(language_model(tokens, loaded)[0], language_model(tokens, given_state)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_sizes_detaching_and_moving() -> None:
    language_model = model()
    after = language_model(torch.randint(11, (3, 5)))[1]
    assert any(x.requires_grad for x in leaves(after))
    assert not any(x.requires_grad for x in leaves(state.detach(after)))
    assert state.nbytes(after) == sum(x.nbytes for x in leaves(after))
    assert state.nbytes(None) == 0
    assert all(torch.equal(a, b) for a, b in zip(leaves(state.to(after, "cpu")), leaves(after), strict=True))


@pytest.mark.parametrize(
    "other",
    [
        model(LAYERS[:2]),
        model([*LAYERS, "s5"]),
        model(d_model=16),
        model([{"mixer": "s5", "d_state": 6}, *LAYERS[1:]]),
        model([{"mixer": "s4d", "d_state": 4}, *LAYERS[1:]]),
        model([*LAYERS[:2], {"mixer": "attention", "n_heads": 1}]),
        model([*LAYERS[:2], {"mixer": "attention", "n_heads": 2, "window": 3}]),
        model([LAYERS[0], {"mixer": "mamba", "d_state": 2, "d_conv": 3}, LAYERS[2]]),
    ],
)
def test_the_state_of_another_model(tmp_path: Path, other: LanguageModel) -> None:
    _, given_state = read()
    state.save(given_state, tmp_path / "s")
    with pytest.raises(ValueError, match="another model"):
        state.load(tmp_path / "s", other.initial_state(1))


def test_files_that_are_no_states(tmp_path: Path) -> None:
    like = model().initial_state(1)
    with pytest.raises(FileNotFoundError, match="no such file"):
        state.load(tmp_path / "none", like)
    with pytest.raises(FileNotFoundError):
        state.load_metadata(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a saved state"):
        state.load(tmp_path / "weights", like)
    for content in (b"", b"x" * 100, b"\x80\x04K\x01."):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable"):
            state.load(tmp_path / "odd", like)


def test_tensors_without_axes_or_of_another_kind(tmp_path: Path) -> None:
    like = (torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.complex64))
    meta = {"format": "longstate-state"}
    for first in (torch.zeros(()), torch.zeros(3), torch.zeros(2, 4)):
        save_file({"0": first, "1": torch.zeros(2, 2, 2)}, tmp_path / "s", metadata=meta)
        with pytest.raises(ValueError, match="another model"):
            state.load(tmp_path / "s", like)
    save_file({"0": torch.zeros(2, 3), "1": torch.zeros(3, 2, 2)}, tmp_path / "s", metadata=meta)
    with pytest.raises(ValueError, match="another model"):
        state.load(tmp_path / "s", like)
    save_file({"0": torch.ones(2, 3, dtype=torch.int32), "1": torch.zeros(2, 2, 2)}, tmp_path / "s", metadata=meta)
    assert state.load(tmp_path / "s", like)[0].dtype == torch.float32


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    language_model, given_state = read()
    path = tmp_path_factory.mktemp("s") / "s"
    state.save(given_state, path)
    content = bytearray(path.read_bytes())
    like = language_model.initial_state(1)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="not a"):
        state.load(path, like)
    content[data.draw(st.integers(0, 7 + int.from_bytes(content[:8], "little")))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        state.load(path, like)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_joining_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="no state"):
        state.concatenate([])
    one, other = model().initial_state(1), model(LAYERS[:2]).initial_state(1)
    with pytest.raises(ValueError, match="structure"):
        state.concatenate([one, other])
    with pytest.raises(ValueError, match="different models"):
        state.concatenate([(torch.zeros(1, 3),), (torch.zeros(1, 4),)])
    for a, b in (
        (S4D(4, 4), S4D(8, 4)),
        (Attention(8, 2, window=4), Attention(8, 2, window=8)),
        (Attention(8, 2), Attention(8, 4)),
    ):
        with pytest.raises(ValueError, match="different models"):
            state.concatenate([a.initial_state(1), b.initial_state(1)])
    with pytest.raises(ValueError, match="different structure"):
        state.concatenate([Attention(8, 2).initial_state(1), Attention(8, 2, window=4).initial_state(1)])
    with pytest.raises(ValueError, match="tuples of tensors"):
        state.detach([1])


def test_a_window_of_another_length_is_refused_though_it_is_empty_here(tmp_path: Path) -> None:
    path = tmp_path / "s"
    state.save(Mamba(4, d_conv=4).initial_state(1), path)
    with pytest.raises(ValueError, match="another model"):
        state.load(path, Mamba(4, d_conv=1).initial_state(1))


def test_complex_numbers_come_back_wherever_the_file_has_them(tmp_path: Path) -> None:
    """A file keeps tensors at multiples of 8 bytes; complex128 is read from multiples of 16, or crashes."""
    for count in (1, 2, 3):
        saved = (torch.randn(1, count, dtype=torch.float64), torch.randn(1, 5, dtype=torch.complex128))
        state.save(saved, tmp_path / "state.safetensors")
        loaded = state.load(tmp_path / "state.safetensors", saved)
        assert loaded[1].data_ptr() % 16 == 0
        assert torch.equal(loaded[1], saved[1])


def test_the_one_state_or_the_other_for_each_sequence() -> None:
    one, other = read()[1], read()[1]
    chosen = state.where(torch.tensor([True, False, True]), one, other)
    for i, source in enumerate((one, other, one)):
        for x, y in zip(leaves(chosen), leaves(source), strict=True):
            assert torch.equal(x[i], y[i])


def test_copying_into_memory_that_the_state_lies_in_itself() -> None:
    """A new state may be made of views of the old one: all of it is read before any is written."""
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    memory = (a, b)
    state.copy_into((torch.tensor([9.0]), a), memory)
    assert (a.item(), b.item()) == (9, 1)
    state.copy_into((b, a), memory)
    assert (a.item(), b.item()) == (1, 9)
    with pytest.raises(ValueError, match=r"shape \[2\] came, the memory is of \[1\]"):
        state.copy_into((a, torch.zeros(2)), memory)
