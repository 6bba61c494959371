"""Liquid-S4 against the expansion of its recurrence into products of inputs."""

from __future__ import annotations

import itertools

import pytest
import torch

from longstate import S4D, LiquidS4, Timeline

STEPS = 7


def real_output(C: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    y = (C * h).sum(-1)
    return 2 * y.real if y.is_complex() else y


def expansion(A: torch.Tensor, B: torch.Tensor) -> list[dict[frozenset[int], torch.Tensor]]:
    """Return, for every step of x_t = (A + B u_t) ∘ x_{t−1} + B u_t, what each product of inputs is multiplied by."""
    terms: dict[frozenset[int], torch.Tensor] = {}
    steps = []
    for t in range(STEPS):
        after = {subset: A * factor for subset, factor in terms.items()}
        after |= {subset | {t}: B * factor for subset, factor in terms.items()}
        after[frozenset({t})] = B
        terms = after
        steps.append(terms)
    return steps


def neighbours(subset: frozenset[int]) -> bool:
    return max(subset) - min(subset) == len(subset) - 1


def built(order: int, kernel: str, initialization: str, rule: str) -> tuple[LiquidS4, tuple[torch.Tensor, ...]]:
    mixer = LiquidS4(2, 4, order, kernel, initialization, rule, dt_min=0.2, dt_max=0.9, output="identity").double()
    log_decay, B, C = (x.detach() for x in mixer.s4d.sampled())
    return mixer, (log_decay.exp(), B, C)


@pytest.mark.parametrize(("initialization", "rule"), [("legs", "bilinear"), ("lin", "zoh"), ("real", "zoh")])
@pytest.mark.parametrize("kernel", ["kb", "pb"])
@pytest.mark.parametrize("order", [2, 3, STEPS])
def test_terms_of_the_expansion(order: int, kernel: str, initialization: str, rule: str) -> None:
    mixer, (A, B, C) = built(order, kernel, initialization, rule)
    u = torch.randn(STEPS, 2, dtype=torch.float64)
    recurrent = torch.zeros_like(A)
    for t, terms in enumerate(expansion(A, B)):
        recurrent = (A + B * u[t, :, None]) * recurrent + B * u[t, :, None]
        products = {subset: factor * u[list(subset)].prod(0)[:, None] for subset, factor in terms.items()}
        torch.testing.assert_close(sum(products.values()), recurrent, rtol=1e-12, atol=1e-12)
        kept = [
            product
            for subset, product in products.items()
            if neighbours(subset) and len(subset) <= order and (kernel == "kb" or len(subset) == 1 or max(subset) == t)
        ]
        wanted = real_output(C, sum(kept)) + mixer.s4d.D * u[t]
        got = mixer(u[None, : t + 1])[0][0, -1]
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_one_pair_of_inputs_is_all_there_is() -> None:
    """Without gaps nothing is left out: the system itself, far beyond the pair, through the convolution too."""
    mixer, (A, B, C) = built(2, "kb", "legs", "bilinear")
    u = torch.zeros(1, 100, 2, dtype=torch.float64)
    u[0, 3:5] = torch.randn(2, 2, dtype=torch.float64)
    h, outputs = torch.zeros_like(A), []
    for t in range(100):
        h = (A + B * u[0, t, :, None]) * h + B * u[0, t, :, None]
        outputs.append(real_output(C, h) + mixer.s4d.D * u[0, t])
    torch.testing.assert_close(mixer(u)[0][0], torch.stack(outputs), rtol=1e-12, atol=1e-12)
    linear = S4D(2, 4, discretization="bilinear", output="identity").double()
    linear.load_state_dict(mixer.s4d.state_dict())
    assert (linear(u)[0] - mixer(u)[0]).abs().max() > 1e-3


def test_products_see_no_padding_and_no_other_sequence() -> None:
    """Every way to put one step that does not count, or a start, among five."""
    mixer, _ = built(3, "kb", "lin", "zoh")
    u = torch.randn(1, 5, 2, dtype=torch.float64)
    for hole, begin in itertools.product(range(5), range(5)):
        index = torch.arange(5)[None]
        got, _ = mixer(u, None, Timeline(start=index == begin, valid=index != hole))
        for part in (range(begin), range(begin, 5)):
            steps = [t for t in part if t != hole]
            torch.testing.assert_close(got[:, steps], mixer(u[:, steps])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"order": 1}, {"d_state": 3}, {"initialization": "real"}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LiquidS4(4, **options)  # type: ignore[arg-type]
