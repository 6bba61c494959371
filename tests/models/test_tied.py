"""A weight that is embedding and head: one gradient, made without a second matrix, and never another one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from longstate import LanguageModel
from longstate.models import _tied, language

VOCABULARY, WIDTH = 11, 8


def model_of(tied: bool = True, dtype: torch.dtype = torch.float64) -> LanguageModel:
    # Of torch's own operations throughout, which every transformation of functions takes.
    layer = {"mixer": None, "mlp": {"hidden": 5}}
    return LanguageModel(VOCABULARY, WIDTH, [layer], tie_embeddings=tied).to(dtype)


def tokens_of() -> Tensor:
    return torch.tensor([[3, 1, 3, 9], [0, 3, 3, 10]])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits, _ = model(tokens)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] = loss_of) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss(model, tokens_of()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call a function while embedding and head know nothing of each other."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(language, "gradients_meet", nullcontext)
            return function(*arguments)

    return call


def operations(function: Callable[[], Any]) -> list[tuple[str, list[Any]]]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        function()
    return [(event.name, event.input_shapes) for event in seen.events()]


def made_apart(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] = loss_of) -> bool:
    return any(name == "aten::embedding_dense_backward" for name, _ in operations(lambda: gradients(model, loss)))


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-13) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype is x.dtype and found[name].layout is torch.strided
        torch.testing.assert_close(found[name], x, rtol=bound, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_is_that_of_two_uses(apart: Callable[..., Any]) -> None:
    model = model_of()
    assert not made_apart(model)
    assert apart(made_apart, model)
    close(gradients(model), apart(gradients, model))


def test_no_second_matrix_is_made() -> None:
    model = model_of()
    sized = [VOCABULARY, WIDTH]
    passes = [
        name
        for name, shapes in operations(lambda: gradients(model))
        if name in ("aten::add", "aten::add_", "aten::fill_", "aten::copy_", "aten::clone") and sized in shapes[:1]
    ]
    assert passes == ["aten::clone", "aten::copy_"]  # of ``gradients`` itself


def test_in_bfloat16(apart: Callable[..., Any]) -> None:
    model = model_of(dtype=torch.bfloat16)
    close(gradients(model), apart(gradients, model), bound=2e-2)


def test_a_gradient_of_the_gradient(apart: Callable[..., Any]) -> None:
    def penalised(model: nn.Module, tokens: Tensor) -> Tensor:
        weights = list(model.parameters())
        found = torch.autograd.grad(loss_of(model, tokens), weights, create_graph=True)
        return torch.stack([x.square().sum() for x in found]).sum()

    model = model_of()
    close(gradients(model, penalised), apart(gradients, model, penalised))


@pytest.mark.parametrize("only", ["backbone", "head"])
def test_one_of_the_two_alone(only: str, apart: Callable[..., Any]) -> None:
    def loss(model: Any, tokens: Tensor) -> Tensor:
        if only == "backbone":
            with language.gradients_meet():
                return model.backbone(tokens)[0].square().sum()
        handle = model.backbone.embedding.register_forward_hook(lambda module, given, rows: rows.detach())
        try:
            return loss_of(model, tokens)
        finally:
            handle.remove()

    model = model_of()
    found = gradients(model, loss)
    assert found["backbone.embedding.weight"].abs().sum() > 0
    close(found, apart(gradients, model, loss))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", ["backbone.embedding", "lm_head", "none"])
def test_untied_or_frozen(tied: bool, frozen: str, apart: Callable[..., Any]) -> None:
    model = model_of(tied)
    if frozen != "none":
        model.get_submodule(frozen).requires_grad_(False)
    assert made_apart(model) == (not tied and frozen != "backbone.embedding")
    close(gradients(model), apart(gradients, model))


def test_gradients_add_up_over_calls_and_passes(apart: Callable[..., Any]) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        first, second = loss_of(model, tokens), loss_of(model, tokens.flip(1))
        first.backward(retain_graph=True)
        first.backward()
        return first.detach() + second

    model = model_of()
    close(gradients(model, loss), apart(gradients, model, loss))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_see_both_modules_and_may_answer() -> None:
    model, seen = model_of(), []
    for module in (model.backbone.embedding, model.lm_head):
        module.register_forward_pre_hook(lambda module, given: seen.append(type(module).__name__))
        module.register_full_backward_hook(lambda module, _, given: seen.append(type(module).__name__.upper()))
        module.register_forward_hook(lambda module, given, result: 2 * result)
    found = gradients(model)
    assert seen == ["Embedding", "Head", "HEAD", "EMBEDDING"]
    bare = model_of()
    bare.load_state_dict(model.state_dict())
    weight = bare.backbone.embedding.weight

    def doubled(bare: Any, tokens: Tensor) -> Tensor:
        logits = 2 * functional.linear(bare.backbone(2 * functional.embedding(tokens, weight))[0], weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    close(found, gradients(bare, doubled))


@pytest.mark.parametrize("how", ["parameter", "data"])
def test_a_weight_that_is_replaced_between_the_two(how: str, apart: Callable[..., Any]) -> None:
    """As programs do that keep weights elsewhere until they are used."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        old = model.lm_head.weight
        numbers = old.detach().clone()

        def replace(*_: Any) -> None:
            if how == "parameter":
                model.lm_head.weight = nn.Parameter(2 * numbers)
            else:
                model.lm_head.weight.data = 2 * numbers

        handle = model.lm_head.register_forward_pre_hook(replace)
        try:
            return loss_of(model, tokens)
        finally:
            handle.remove()
            model.lm_head.weight = old

    model, other = model_of(), model_of()
    other.load_state_dict(model.state_dict())
    close(gradients(model, loss), apart(gradients, other, loss))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_is_computed_again(reentrant: bool, apart: Callable[..., Any]) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        enabling = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return checkpoint(lambda _: loss_of(model, tokens), enabling, use_reentrant=reentrant)

    model = model_of()
    close(gradients(model, loss), apart(gradients, model))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_functions_of_parameters(apart: Callable[..., Any]) -> None:
    model = model_of()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits, _ = torch.func.functional_call(model, parameters, (tokens,))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    wanted = apart(gradients, model)
    close(torch.func.grad(loss)(parameters, tokens_of()), wanted)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, tokens_of()[:, None])
    close({name: x.mean(0) for name, x in each.items()}, wanted)
    along = {name: torch.randn_like(x) for name, x in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, tokens_of()), (parameters,), (along,))
    torch.testing.assert_close(slope, torch.stack([(along[name] * x).sum() for name, x in wanted.items()]).sum())


def test_many_gradients_at_once() -> None:
    model = model_of()
    each = loss_of(model, tokens_of()) * torch.tensor([1.0, -2.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(
        each, [model.lm_head.weight], torch.eye(2, dtype=torch.float64), is_grads_batched=True
    )
    wanted = gradients(model)["backbone.embedding.weight"]
    torch.testing.assert_close(found, torch.stack([wanted, -2 * wanted]), rtol=1e-12, atol=1e-13)


def test_sequences_one_by_one_in_a_call_for_all(apart: Callable[..., Any]) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = torch.func.vmap(lambda row: model(row[None])[0][0])(tokens)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    model = model_of()
    close(gradients(model, loss), apart(gradients, model))


def test_a_weight_of_another_class_is_left_alone() -> None:
    class Elsewhere(nn.Parameter):
        pass

    model = model_of()
    assert not made_apart(model)
    model.lm_head.weight = model.backbone.embedding.weight = Elsewhere(model.lm_head.weight.detach())
    assert type(model.lm_head.weight) is Elsewhere and made_apart(model)


def test_a_gradient_that_is_one_number_for_all() -> None:
    weight = torch.zeros(VOCABULARY, WIDTH, requires_grad=True)
    rows, again = _tied._EmbeddingAndWeight.apply(tokens_of(), weight)
    (rows.sum() + again.sum()).backward()
    counts = functional.one_hot(tokens_of(), VOCABULARY).sum((0, 1)).float()
    torch.testing.assert_close(weight.grad, (1 + counts)[:, None].expand(-1, WIDTH))


def test_an_embedding_with_options_keeps_them(apart: Callable[..., Any]) -> None:
    model = model_of()
    model.backbone.embedding.padding_idx = 3
    assert made_apart(model)
    close(gradients(model), apart(gradients, model))


def test_nothing_is_handed_on_from_one_call_to_the_next() -> None:
    model = model_of()
    loss_of(model, tokens_of()).backward()
    assert _tied._MEETING.get() is None
    with pytest.raises(IndexError):
        model(tokens_of() + VOCABULARY)
    assert _tied._MEETING.get() is None
    inside: list[Any] = []
    model.backbone.embedding.register_forward_pre_hook(lambda *_: inside.append(list(_tied._MEETING.get() or [])))
    loss_of(model, tokens_of()).backward()
    assert inside == [[]]


def test_the_same_for_any_number_of_threads() -> None:
    found: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = torch.ones(2, 300, WIDTH).cumsum(1) / 7
            tokens = torch.arange(600).view(2, 300) % VOCABULARY
            weight = torch.zeros(VOCABULARY, WIDTH, requires_grad=True)
            taken, again = _tied._EmbeddingAndWeight.apply(tokens, weight)
            ((taken * rows).sum() + (again * rows[0, :VOCABULARY]).sum()).backward()
            found.append(weight.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], x) for x in found)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
def test_compiled_it_is_one_graph_with_the_same_gradient() -> None:
    model = model_of(dtype=torch.float32)
    wanted = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, tokens_of()).backward()
    model.zero_grad(set_to_none=True)
    loss_of(compiled, tokens_of()).backward()
    close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted, bound=1e-5)
