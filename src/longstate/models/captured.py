"""One token of each sequence through a model as a CUDA graph: all its kernels are started in one call."""

from __future__ import annotations

from typing import Any

import torch

from .. import state as states
from .._shapes import Float, Int, Tensor
from ..ops import _triton
from .experts import Experts
from .language import LanguageModel


class CapturedStep:
    """Take one token of each of a fixed number of sequences through a model, again and again.

        logits_t, state_t = model(token_t, state_{t−1})

    The states have memory of their own and change in place, which saves writing them a second time. Nobody sees that:
    what ``load`` takes and ``state`` returns are values, as everywhere. Where there is no CUDA device the same is done
    call by call.

    Args:
        model: The model, whose parameters may change in place but not be replaced.
        batch_size: The number of sequences.

    Raises:
        ValueError: If a layer has no state, or one that grows with what was read, or the model has experts.

    Example:
        >>> import torch
        >>> from longstate import LanguageModel
        >>> from longstate.models.captured import CapturedStep
        >>> model = LanguageModel(vocab_size=16, d_model=32, layers=["mamba2"])
        >>> step = CapturedStep(model, batch_size=2)
        >>> logits = step(torch.tensor([3, 5]))
        >>> same, state = model(torch.tensor([[3], [5]]))
        >>> torch.allclose(logits, same[:, 0], atol=1e-5)
        True
    """

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        device = next(model.parameters()).device
        _refuse(model)
        self.model = model
        self._token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self._state = states.copy(model.initial_state(batch_size))
        self._value: Any = None  # of the states as they are now, if it is known
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            if device.type == "cuda":
                with torch.cuda.device(device):
                    self._capture()
                states.copy_into(model.initial_state(batch_size), self._state)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is compiled or chosen at a first call must not be in the graph
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            self._run()

    def _run(self) -> None:
        with _triton.in_place():
            logits, after = self.model(self._token, self._state)
            self._logits = logits[:, 0]
        states.copy_into(after, self._state)

    @torch.no_grad()
    def load(self, state: Any) -> None:
        """Go on from a state of ``batch_size`` sequences.

        Raises:
            ValueError: If its structure or its shapes are not those of the model's states.
        """
        if state is self._value:
            return
        self._value = None
        states.copy_into(state, self._state)
        self._value = state

    @property
    def state(self) -> Any:
        """The state after the last token, as a value."""
        if self._value is None:
            self._value = states.copy(self._state)
        return self._value

    @torch.no_grad()
    def __call__(self, token: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        """Return the logits after one more token of each sequence, in memory that the next call writes over.

        Raises:
            ValueError: If there is not one token for each sequence.
        """
        if token.shape != self._token.shape[:1]:
            raise ValueError(f"CapturedStep: tokens of shape {list(token.shape)}, wanted {[len(self._token)]}")
        self._value = None
        self._token.copy_(token[:, None])
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self._logits


def _refuse(model: LanguageModel) -> None:
    """Raise if there can be no graph of a model's step."""
    for i, layer in enumerate(model.initial_state(1)):
        if layer is None or states.growing(layer):
            what = "no state" if layer is None else "a state that grows with what was read"
            raise ValueError(
                f"CapturedStep: layers[{i}] ({model.config['layers'][i]!r:.80}) has {what}; a graph needs memory of"
                " a fixed size. Call the model itself."
            )
    if any(isinstance(part, Experts) for part in model.modules()):
        raise ValueError(
            "CapturedStep: the model has experts, and which of them are computed is not known before each token."
            " Call the model itself."
        )
