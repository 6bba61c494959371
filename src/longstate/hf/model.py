"""A language model of ours as a ``transformers`` model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .._shapes import Float, Int, Shaped, Tensor
from ..models import LanguageModel
from ..models._tied import gradients_meet
from ..models.language import bounded
from ..timeline import Timeline
from .cache import LongstateCache, Steps
from .configuration import LongstateConfig


class LongstateForCausalLM(PreTrainedModel, GenerationMixin):
    """A ``LanguageModel`` for ``generate``, ``Trainer``, PEFT, TRL and evaluation harnesses.

    Parameters have the names that they have in ``LanguageModel``: a folder of ``longstate.save`` opens through
    ``from_pretrained``, and one of ``save_pretrained`` through ``longstate.load``. The cache is the model's state.

    Args:
        config: The configuration.
    """

    config_class = LongstateConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # it is the one way in which attention is computed
    accepts_loss_kwargs = True  # num_items_in_batch, by which Trainer's accumulated steps are one mean over tokens
    _no_split_modules = ["Block"]  # noqa: RUF012  the names and kinds that transformers reads
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LongstateConfig) -> None:
        super().__init__(config)
        model = LanguageModel.from_config(config.options())
        self.backbone, self.lm_head = model.backbone, model.lm_head
        if not self.lm_head.weight.is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # drawn by LanguageModel
        self.post_init()

    @classmethod
    def from_model(cls, model: nn.Module) -> LongstateForCausalLM:
        """Return a model that shares its parameters with this one.

        Raises:
            ValueError: If it is not a ``LanguageModel``.
        """
        if not isinstance(model, LanguageModel):
            raise ValueError(
                f"LongstateForCausalLM.from_model: a {type(model).__name__} came, wanted a LanguageModel. A folder is "
                f"read by longstate.hf.load_pretrained."
            )
        with torch.device("meta"):
            wrapped = cls(LongstateConfig(**model.config))
        wrapped.backbone, wrapped.lm_head = model.backbone, model.lm_head
        wrapped.config.dtype = model.lm_head.weight.dtype
        return wrapped.train(model.training)

    def to_model(self) -> LanguageModel:
        """Return a ``LanguageModel`` that shares its parameters with this model."""
        with torch.device("meta"):
            model = LanguageModel.from_config(self.config.options())
        model.backbone, model.lm_head = self.backbone, self.lm_head
        return model.train(self.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """Read a model in our format; arguments and result are those of ``transformers``.

        For the published models of others see ``longstate.hf.load_pretrained``.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers puts new parameters in place of ours, without the marks that our optimisers read.
        with torch.device("meta"):
            marked = LanguageModel.from_config(model.config.options())
        for name, parameter in marked.named_parameters():
            vars(model.get_parameter(name)).update(vars(parameter))
        return loaded

    @property
    def base_model(self) -> nn.Module:
        """What stands before the head, called as a ``transformers`` model."""
        return _Headless(self)

    def get_decoder(self) -> nn.Module:
        """Return what stands before the head, called as a ``transformers`` model."""
        return self.base_model

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks recompute their insides in the backward pass."""
        return self.backbone.checkpoint_activations

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.backbone.checkpoint_activations = value

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.backbone.embedding  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in place."""
        self.backbone.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in place."""
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        """Change the number of tokens; arguments and result are those of ``transformers``."""
        embedding = super().resize_token_embeddings(*arguments, **options)
        if embedding.num_embeddings == self.config.vocab_size:
            self.config.pad_vocab_size_multiple = 1
        return embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that a file lacked, and leave those that it had."""
        lacking = [p for p in module.parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
        if not lacking:
            return
        # What is inside a mixer or channel mixer is drawn by it: a part alone does not know its distribution.
        parts = [part for block in self.backbone.layers for part in block.children()]
        owner = next((part for part in parts if any(module is inner for inner in part.modules())), module)
        if not hasattr(owner, "reset_parameters") or isinstance(owner, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
            return
        found = [(p, p.clone()) for p in owner.parameters() if getattr(p, "_is_hf_initialized", False)]
        owner.reset_parameters()  # type: ignore[operator]
        for parameter, value in found:
            parameter.copy_(value)
        for parameter in owner.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    def generate(  # type: ignore[override]  # the other arguments pass through by name
        self, inputs: Tensor | None = None, generation_config: Any = None, **options: Any
    ) -> Any:
        """Write on from a batch of prompts; arguments and result are those of ``transformers``.

        Args:
            inputs: Token numbers; of prompts of unequal length, padded on the left.
            generation_config: Options of generation; the model's own when absent.
            options: Further options of generation, and arguments of ``forward``. A ``LongstateCache`` as
                ``past_key_values`` holds afterwards what was read, and can be given again with a longer text.
        """
        chosen = generation_config or self.generation_config
        use_cache = options.get("use_cache")
        if (chosen.use_cache if use_cache is None else use_cache) is not False:
            cache = options.get("past_key_values")
            cache = options["past_key_values"] = LongstateCache() if cache is None else cache
            looked_up = options.get("prompt_lookup_num_tokens", getattr(chosen, "prompt_lookup_num_tokens", None))
            if options.get("assistant_model") is not None or looked_up or getattr(chosen, "is_assistant", False):
                cache.activate_past_recording()
        return super().generate(inputs, generation_config, **options)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config: Any, *arguments: Any, **options: Any) -> Any:
        """Prepare a cache, which is ours already where one is wanted."""
        # The second is what transformers 5.0 wants of assisted decoding: a cache that can be cropped. Ours can.
        if generation_config.cache_implementation in ("dynamic", "dynamic_full"):
            generation_config.cache_implementation = None
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"LongstateForCausalLM: cache_implementation={generation_config.cache_implementation!r} came, but the "
                f"cache is the model's state. Leave it out."
            )
        return super()._prepare_cache_for_generation(generation_config, *arguments, **options)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Shaped[Tensor, "..."] | None = None,
        attention_mask: Shaped[Tensor, "b s"] | None = None,
        position_ids: Shaped[Tensor, "..."] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " n"] = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Any = None,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        """Return the logits of the token after each step, the loss if there are labels, and the cache.

        Args:
            input_ids: Token numbers ``[b t]``.
            attention_mask: 0 at steps that do not count; of the new steps, or of all that were read and the new ones.
            position_ids: Only what is 0 in it is looked at: there a new sequence begins, of several packed into a row.
            past_key_values: A ``LongstateCache``: what was read before. It holds the new steps as well afterwards.
            inputs_embeds: Already embedded inputs in place of ``input_ids``.
            labels: Token numbers, −100 where there is none: the token that is *at* a step, not the one after it.
            use_cache: Whether to return a cache; not in training, when absent.
            logits_to_keep: Only the logits of that many last steps (0: all), or of the steps with these numbers.
            output_hidden_states: Whether to return the residual stream before each layer, and what the head takes.
            output_attentions: Not available.
            return_dict: Whether to return an object with named entries rather than a tuple.
            cache_position: Ignored: the cache knows.
            num_items_in_batch: Divides the sum of losses, in place of the number of labels.
            options: ``shift_labels``: the token after each step, in place of ``labels``; ``tokenizer``: ignored.

        Raises:
            TypeError: If there are other options.
            ValueError: If arguments do not go together, or ask for attention maps, which there are none of.
        """
        # Not among the arguments: Trainer computes a loss in evaluation only if every label named there is given.
        shift_labels = options.pop("shift_labels", None)
        options.pop("tokenizer", None)  # generate, given one to find stop strings, hands it on
        if options:
            raise TypeError(f"LongstateForCausalLM: unexpected arguments {', '.join(sorted(options))}")
        with gradients_meet():
            read = self.read(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                logits_to_keep,
                output_hidden_states,
                output_attentions,
            )
            hidden: Tensor = read.last_hidden_state  # type: ignore[assignment]  # optional in name only
            loss = None
            if labels is not None or shift_labels is not None:
                logits = self._logits(hidden).contiguous()
                shift_labels = None if shift_labels is None else shift_labels.contiguous()
                loss = self.loss_function(
                    logits,
                    labels,
                    self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=shift_labels,
                )
                logits = logits[:, _kept(logits_to_keep)]
            else:
                logits = self._logits(hidden[:, _kept(logits_to_keep)])
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=read.past_key_values, hidden_states=read.hidden_states
        )
        wanted = return_dict if return_dict is not None else self.config.return_dict
        return result if wanted else result.to_tuple()

    def read(
        self,
        input_ids: Shaped[Tensor, "..."] | None = None,
        attention_mask: Shaped[Tensor, "b s"] | None = None,
        position_ids: Shaped[Tensor, "..."] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " n"] = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Return what the head takes, and the cache; arguments as in ``forward``."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("LongstateForCausalLM: wanted either input_ids or inputs_embeds")
        if inputs.ndim != (2 if inputs_embeds is None else 3) or inputs.is_floating_point() != (input_ids is None):
            raise ValueError(
                f"LongstateForCausalLM: {'input_ids' if inputs_embeds is None else 'inputs_embeds'} of shape "
                f"{list(inputs.shape)} and type {inputs.dtype} came; wanted token numbers [batch, time] as input_ids, "
                f"or numbers [batch, time, channels] as inputs_embeds"
            )
        if output_attentions:
            raise ValueError("LongstateForCausalLM: there are no attention maps. Leave output_attentions out.")
        cache = self._cache(past_key_values)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        steps = self._steps(inputs, attention_mask, position_ids, cache)
        observed = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with self._observed(observed) as seen:
            if use_cache or cache is not None:
                cache = LongstateCache() if cache is None else cache
                keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else steps.length
                hidden = cache.read(self, steps, keep)
            else:
                hidden, _ = self.advance(_without_right_padding(steps), None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*(x[:, x.shape[1] - steps.length :] for x in seen), hidden) if observed else None,
        )

    def advance(self, steps: Steps, state: Any) -> tuple[Float[Tensor, "b t d"], Any]:
        """Run the stack over steps, from a state to a state."""
        timeline = None
        if steps.valid is not None or steps.start is not None:
            timeline = Timeline(start=steps.start, valid=steps.valid)
        return self.backbone(steps.inputs, state, timeline)

    def _logits(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Return the logits of the tokens that exist."""
        logits = self.lm_head(hidden)[..., : self.config.vocab_size]
        return bounded(logits, self.config.logits_divisor, self.config.logits_soft_cap)

    @staticmethod
    def _cache(given: Any) -> LongstateCache | None:
        """Return the cache that was given; an empty one of another kind is as good as none."""
        if given is None or isinstance(given, LongstateCache):
            return given
        if hasattr(given, "get_seq_length") and given.get_seq_length() == 0:
            return LongstateCache()
        raise ValueError(
            f"LongstateForCausalLM: past_key_values of type {type(given).__name__} came. Give a LongstateCache or none."
        )

    @staticmethod
    def _steps(inputs: Tensor, mask: Tensor | None, position: Tensor | None, cache: LongstateCache | None) -> Steps:
        """Return inputs with what is known of them: None where all count, which is quicker and the same."""
        batch, length = inputs.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        valid = start = None
        if mask is not None:
            if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
                raise ValueError(
                    f"LongstateForCausalLM: attention_mask of shape {list(mask.shape)} came with {batch} sequences of "
                    f"{length} new steps after {past}; wanted [{batch}, {past + length}] or [{batch}, {length}]"
                )
            valid = mask[:, mask.shape[1] - length :] != 0
            valid = None if bool(valid.all()) else valid
        if position is not None and position.shape[-1] == length and position.ndim == 2:
            start = (position == 0).expand(batch, length)
            if valid is not None:
                start = start & valid
            if past == 0:
                # The first step that counts begins a sequence in any case.
                start = start & ((torch.ones_like(start) if valid is None else valid).cumsum(1) > 1)
            start = start if bool(start.any()) else None
        return Steps(inputs, valid, start)

    @contextmanager
    def _observed(self, wanted: bool | None) -> Iterator[list[Tensor]]:
        """Collect the residual stream before each layer; over several calls of the stack, in one piece each."""
        seen: dict[int, list[Tensor]] = {i: [] for i in range(len(self.backbone.layers))}
        collected: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(lambda _, given, i=i: seen[i].append(given[0]))
            for i, block in enumerate(self.backbone.layers if wanted else ())
        ]
        try:
            yield collected
        finally:
            for handle in handles:
                handle.remove()
            collected.extend(torch.cat(parts, 1) for parts in seen.values() if parts)


class _Headless(nn.Module):
    """A model without its head, for trainers that apply it themselves. It owns no parameters."""

    _tp_plan = _pp_plan = None  # as transformers asks of what a model is built on

    def __init__(self, model: LongstateForCausalLM) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no part of this module

    def forward(
        self, *arguments: Any, return_dict: bool | None = None, cache_position: Any = None, **options: Any
    ) -> BaseModelOutputWithPast:
        return self._model[0].read(*arguments, **options)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    return (
        slice(-logits_to_keep if logits_to_keep else None, None) if isinstance(logits_to_keep, int) else logits_to_keep
    )


def _without_right_padding(steps: Steps) -> Steps:
    """Take steps that do not count for ones that do where they stand on the right: nothing before can see them."""
    valid = steps.valid
    if valid is None or not bool((valid[:, 1:] <= valid[:, :-1]).all()):
        return steps
    return steps._replace(valid=None)
