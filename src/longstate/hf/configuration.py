"""The configuration of a language model as a ``transformers`` configuration, and as one file with ours."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..checkpoints.native import FORMAT
from ..models import LanguageModel
from ..models.stack import LayerSpec

_OPTIONS = {parameter.name: parameter.default for parameter in inspect.signature(LanguageModel).parameters.values()}


class LongstateConfig(PreTrainedConfig):
    """The arguments of ``LanguageModel``, beside what every ``transformers`` configuration has.

    The ``config.json`` it writes is that of ``longstate.save``, which reads either.

    Args:
        vocab_size: Tokens that exist.
        d_model: Channels of the residual stream; ``hidden_size`` is another name for it.
        layers: For each layer the name of a mixer or a mapping, as in ``Stack``.
        options: The other arguments of ``LanguageModel`` (``tie_word_embeddings`` is another name for
            ``tie_embeddings``), and those of ``transformers.PreTrainedConfig``.

    Raises:
        ValueError: If it is that of another kind of model, or an option is known to neither and nearly one of ours.
    """

    model_type = "longstate"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  the name and kind that transformers reads
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "tie_word_embeddings": "tie_embeddings",
        # By these names trainers that apply the head themselves look for what comes after it.
        "logits_scaling": "logits_divisor",
        "final_logit_softcapping": "logits_soft_cap",
    }

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 256,
        layers: Sequence[LayerSpec] = ("mamba2",) * 4,
        **options: Any,
    ) -> None:
        if (kind := options.pop("model_type", self.model_type)) != self.model_type:
            raise ValueError(
                f"LongstateConfig: this is the configuration of a {kind!r} model. Read published models of other kinds "
                f"with longstate.hf.load_pretrained."
            )
        options = {self.attribute_map.get(name, name): x for name, x in options.items() if name not in FORMAT}
        given = {"vocab_size": vocab_size, "d_model": d_model, "layers": copy.deepcopy(list(layers))}
        given |= {name: options.pop(name) for name in _OPTIONS if name in options}
        for name in options:
            # transformers takes any name; one that is nearly ours is a misspelling, which would go unheard.
            if not hasattr(PreTrainedConfig, name) and (near := difflib.get_close_matches(name, _OPTIONS, 1, 0.8)):
                raise ValueError(f"LongstateConfig: unknown option {name!r}. Did you mean {near[0]!r}?")
        super().__init__(**options)
        for name, default in _OPTIONS.items():
            setattr(self, name, given.get(name, default))
        for name, value in FORMAT.items():
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        # transformers makes every configuration a dataclass, and compares only what is declared as a field.
        return isinstance(other, LongstateConfig) and self._content() == other._content()

    def _content(self) -> dict[str, Any]:
        where_from = ("transformers_version", "_name_or_path", "architectures")
        return {name: value for name, value in self.to_dict().items() if name not in where_from}

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``LanguageModel``."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _OPTIONS}
