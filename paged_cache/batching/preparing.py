"""Input processing: `generate` itself turns a prompt and its options into processors, criteria and a config."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from ..devices import input_device
from ..errors import InvalidRequestError
from ..wording import shown
from .options import require_numbers
from .shadow import shadow

SERVED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)

UNSERVED = {
    GenerationMode.CONTRASTIVE_SEARCH: "penalty_alpha",
    GenerationMode.ASSISTED_GENERATION: "assistant_model, prompt_lookup_num_tokens",
    GenerationMode.DOLA_GENERATION: "dola_layers",
    GenerationMode.GROUP_BEAM_SEARCH: "num_beam_groups",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "constraints, force_words_ids",
}
"""Other ways of decoding, and which options ask for them."""

REFUSED = {
    "adapter_names": "one request has one adapter_name",
    "assistant_model": "assisted generation is not served; call model.generate with past_key_values=PagedCache(pool)",
    "cache_implementation": "keys and values are kept in the batcher's pool",
    "custom_generate": "the batcher decodes by itself",
    "inputs": "the prompt is the first argument",
    "input_ids": "the prompt is the first argument",
    "past_key_values": "keys and values are kept in the batcher's pool",
    "position_ids": "positions count the tokens of the prompt",
    "prefill_chunk_size": "prompts are cut into pieces by the batcher: ContinuousBatcher(..., max_num_batched_tokens=...)",
    "synced_gpus": "the batcher runs in one process",
}
"""Arguments of `generate` that make no sense here, and why."""

CARRIED = {"attention_mask", "position_ids", "logits_to_keep", "past_key_values", "use_cache", "tokenizer"}
"""Inputs of a forward that `generate` makes by itself and that the batcher makes in its own way."""


@dataclass
class Prepared:
    """What `generate` made of a prompt and its options, before its first forward.

    Attributes:
        input_ids: int64 `[num_rows, prompt_length]`: a row for each sequence that is decoded at once.
        processors: What changes the scores of the next token.
        criteria: What says that a sequence is complete.
        config: All options, defaults filled in.
        mode: Greedy search, sampling or a beam search.
        streamer: Gets the prompt, then each token; None for nobody.
        model_kwargs: What the decoding loop passes to a forward.
    """

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    mode: GenerationMode
    streamer: Any = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)


class Preparation:
    """Prepares requests for one model.

    Args:
        model: Whose `generate` is asked.
        tokenizer: For `stop_strings`; None if there is none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self._device, self._tokenizer = input_device(model), tokenizer
        self._asked = shadow(
            model,
            _prepare_cache_for_generation=lambda *args, **kwargs: None,
            _get_stopping_criteria=self._stopping_criteria(type(model)),
        )
        self._accepts_mask = "attention_mask" in inspect.signature(model.forward).parameters

    def __call__(self, prompt_ids: list[int], generation_config: Any, options: dict[str, Any]) -> Prepared:
        """Runs `generate` up to its first forward.

        Raises:
            InvalidRequestError: An option that cannot be honoured; the message names it.
            ValueError, TypeError: What `generate` itself says of options that are wrong.
        """
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise InvalidRequestError(
                f"generation_config is {type(generation_config).__name__}; a GenerationConfig is needed, or options by name."
            )
        require_numbers({**(vars(generation_config) if generation_config else {}), **options})
        for name in REFUSED:
            if _says_something(options.get(name)) or _says_something(getattr(generation_config, name, None)):
                raise InvalidRequestError(f"{name} cannot be honoured: {REFUSED[name]}.")
        options = {name: value for name, value in options.items() if name not in REFUSED}
        streamer = options.pop("streamer", None)
        ids = torch.tensor([prompt_ids], dtype=torch.int64, device=self._device)
        mask = {"attention_mask": torch.ones_like(ids)} if self._accepts_mask else {}
        try:
            prepared: Prepared = self._asked.generate(
                ids, generation_config=generation_config, custom_generate=_capture, **{**mask, **options}
            )
        except TypeError as error:
            raise InvalidRequestError(f"one of the options {shown(options, 300)} has a wrong type: {error}") from error
        prepared.streamer = streamer
        _require_served(prepared)
        return prepared

    def _stopping_criteria(self, kind: Any) -> Any:
        """`generate` forgets its tokenizer when it is given a `custom_generate`; this one remembers the batcher's."""

        def _get_stopping_criteria(
            model: Any, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None
        ) -> Any:
            tokenizer = tokenizer if tokenizer is not None else self._tokenizer
            return kind._get_stopping_criteria(model, generation_config, stopping_criteria, tokenizer=tokenizer)

        return _get_stopping_criteria


def _capture(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Prepared:
    """Stands in the place of a decoding loop and returns what it would get."""
    mode = generation_config.get_generation_mode(None)
    return Prepared(input_ids, logits_processor, stopping_criteria, generation_config, mode, None, model_kwargs)


def _require_served(prepared: Prepared) -> None:
    config = prepared.config
    for name in ("num_beams", "num_return_sequences"):
        if (value := getattr(config, name, None)) is not None and value < 1:
            raise InvalidRequestError(f"{name}={value}: at least 1 is needed.")
    if prepared.mode not in SERVED_MODES:
        served = ", ".join(mode.value for mode in SERVED_MODES)
        names = UNSERVED.get(prepared.mode, "generation_config")
        raise InvalidRequestError(
            f"{names} cannot be honoured: that is {prepared.mode.value}, and the batcher serves {served}."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise InvalidRequestError(f"{name}=True cannot be honoured: a forward serves many requests at once.")
    if config.use_cache is False:
        raise InvalidRequestError("use_cache=False cannot be honoured: keys and values are kept in the batcher's pool.")
    inputs = sorted(
        name for name, value in prepared.model_kwargs.items() if name not in CARRIED and _says_something(value)
    )
    if inputs:
        raise InvalidRequestError(
            f"{inputs[0]} cannot be honoured: forwards of a batch get token ids and positions only."
        )
    if prepared.streamer is not None and len(prepared.input_ids) > 1:
        raise InvalidRequestError(
            f"streamer takes one sequence, the request decodes {len(prepared.input_ids)}: leave out num_beams and "
            "num_return_sequences."
        )


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, dict) and not value)
