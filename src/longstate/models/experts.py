"""A mixture of experts: each step goes through a few of many small MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Int, Tensor
from ..mixers._parts import Linear
from ..ops import linear
from .channels import ACTIVATIONS, MLP, GatedMLP

ROUTERS = ("softmax", "sigmoid")


class Router(Linear):
    """A linear map of each step to one score per expert, computed in float32 at least: near ties are real choices."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the scores before softmax or sigmoid."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return linear(input.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """Send each step through the ``top_k`` experts that a router chooses for it, and add what they make of it.

        y = Σ_{e chosen} w_e · W₂ᵉ (u ∘ φ(g)) + shared(x),    [u, g] = W₁ᵉ x    (W₂ᵉ φ(W₁ᵉ x) without gates)

    softmax: s = softmax(W_r x), the ``top_k`` largest are chosen, w = s. sigmoid: s = σ(W_r x); s + b chooses, where b
    balances the load and is no parameter of the loss: first ``top_groups`` of ``n_groups`` groups of experts, by the
    sum of their two largest, then the ``top_k`` largest within; w = s. Then w ← w / Σ w if ``normalize``, times
    ``scale``.

    Args:
        d_model: Channels.
        n_experts: Experts to choose from.
        top_k: Experts that each step goes through.
        hidden: Inner channels of an expert.
        activation: φ: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        gated: Whether experts have gates.
        router: "softmax" or "sigmoid".
        normalize: Whether the weights of the chosen sum to ``scale``.
        n_groups: Groups of experts (sigmoid).
        top_groups: Groups that are chosen from.
        scale: Factor of the weights.
        shared: Inner channels of an MLP that every step goes through as well; none when absent.
        latent: Channels of a smaller space that experts work in; ``d_model`` when absent.
        bias: Whether the shared MLP and the projections to and from the smaller space have biases.

    Raises:
        ValueError: If the numbers do not go together.

    Source:
        Shazeer et al., arXiv:1701.06538; softmax: Jiang et al., arXiv:2401.04088; sigmoid: DeepSeek-AI,
        arXiv:2412.19437.
    """

    router_bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        hidden: int,
        activation: str = "silu",
        gated: bool = True,
        router: str = "softmax",
        normalize: bool = False,
        n_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        shared: int | None = None,
        latent: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if min(n_experts, hidden, d_model if latent is None else latent) < 1 or not 1 <= top_k <= n_experts:
            raise ValueError(
                f"Experts(n_experts={n_experts}, top_k={top_k}, hidden={hidden}, latent={latent}): sizes start at 1, "
                f"and a step goes through n_experts at most"
            )
        check_choice("Experts", "activation", activation, ACTIVATIONS)
        check_choice("Experts", "router", router, ROUTERS)
        if n_groups < 1 or n_experts % n_groups or not 1 <= top_groups <= n_groups:
            raise ValueError(
                f"Experts(n_experts={n_experts}, n_groups={n_groups}, top_groups={top_groups}): groups are of equal "
                f"size, and top_groups are from 1 to n_groups"
            )
        if n_groups > 1 and (router != "sigmoid" or n_experts // n_groups < 2):
            raise ValueError(
                f"Experts(n_groups={n_groups}): only the sigmoid router has groups, of two experts at least"
            )
        if top_k > n_experts // n_groups * top_groups:
            raise ValueError(
                f"Experts(top_k={top_k}): the {top_groups} of {n_groups} groups that are chosen have only "
                f"{n_experts // n_groups * top_groups} experts"
            )
        self.top_k, self.activation, self.gated = top_k, activation, gated
        self.normalize, self.n_groups, self.top_groups, self.scale = normalize, n_groups, top_groups, scale
        inside = d_model if latent is None else latent
        self.router = Router(d_model, n_experts, bias=False)
        self.register_buffer("router_bias", torch.empty(n_experts) if router == "sigmoid" else None)
        self.fc1 = nn.Parameter(torch.empty(n_experts, (2 if gated else 1) * hidden, inside))
        self.fc2 = nn.Parameter(torch.empty(n_experts, inside, hidden))
        self.latent_in = None if latent is None else Linear(d_model, latent, bias=bias)
        self.latent_out = None if latent is None else Linear(latent, d_model, bias=bias)
        self.shared = None if shared is None else (GatedMLP if gated else MLP)(d_model, shared, bias, activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw everything as ``torch.nn.Linear`` does; no correction of the load."""
        for module in (self.router, self.latent_in, self.latent_out, self.shared):
            if module is not None:
                module.reset_parameters()
        for weight in (self.fc1, self.fc2):
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[-1]), 1 / math.sqrt(weight.shape[-1]))
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert as torch does, but keep the correction in float32: it is compared with scores, and small."""
        before = self.router_bias
        super()._apply(fn, recurse)
        after = self.router_bias
        if before is not None and after is not None and before.dtype != after.dtype and not before.is_meta:
            self.router_bias = before.to(after.device, torch.promote_types(after.dtype, torch.float32))
        return self

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the mixed channels.

        Compiled, every step goes through every expert, since which ones it needs is not known to the compiler.
        """
        flat = x.flatten(0, 1)
        weight, chosen = self.route(flat)
        inside = flat if self.latent_in is None else self.latent_in(flat)
        y = (
            self._dense(inside, weight, chosen)
            if torch.compiler.is_compiling()
            else self._sparse(inside, weight, chosen)
        )
        y = (y if self.latent_out is None else self.latent_out(y)).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def route(self, x: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "s k"], Int[Tensor, "s k"]]:
        """Return the weights and numbers of the experts that each step goes through."""
        scores = self.router(x)
        if self.router_bias is None:
            weight, chosen = scores.softmax(-1).topk(self.top_k)
        else:
            scores = scores.sigmoid()
            choice = scores + self.router_bias
            if self.n_groups > 1:
                groups = choice.unflatten(-1, (self.n_groups, -1))
                best = groups.topk(2).values.sum(-1).topk(self.top_groups).indices
                left = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
                choice = groups.masked_fill(left[..., None], -torch.inf).flatten(-2)
            chosen = choice.topk(self.top_k).indices
            weight = scores.gather(-1, chosen)
        if self.normalize:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
        return (weight * self.scale).to(x.dtype), chosen

    def _sparse(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """Run each expert on the steps that chose it, ordered by expert and brought back into their own order."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.router.out_features).tolist()
        pieces = x[order // self.top_k].split(counts)
        first, second = self._products()
        y = [self._expert(piece, partial(first, e), partial(second, e)) for e, piece in enumerate(pieces) if len(piece)]
        if not y:
            return torch.zeros_like(x)
        y = torch.cat(y)[order.argsort()].unflatten(0, (-1, self.top_k))
        return (y * weight[..., None]).sum(1)

    def _dense(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """Run all experts on all steps, most of them with weight 0."""
        every = x.new_zeros(len(x), self.router.out_features).scatter(1, chosen, weight)
        y = self._expert(x, lambda x: x @ self.fc1.mT, lambda x: x @ self.fc2.mT)
        return torch.einsum("esd,se->sd", y, every)

    def _products(self) -> tuple[Callable[[int, Tensor], Tensor], ...]:
        """Return the products with the two matrices of an expert."""
        fc1, fc2 = self.fc1, self.fc2  # asked for once: an adapter may compute them
        return lambda e, x: linear(x, fc1[e]), lambda e, x: linear(x, fc2[e])

    def _expert(self, x: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply one expert, or all of them."""
        h, act = first(x), ACTIVATIONS[self.activation]
        if self.gated:
            u, gate = h.chunk(2, -1)
            return second(u * act(gate))
        return second(act(h))
