"""transformers' own `_forward` in two halves: what it asks of `generate`, and what it makes of the answer."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Pipeline
from transformers.generation.utils import GenerateDecoderOnlyOutput

from paged_cache import InvalidRequestError, RequestOutput


class _Asked(Exception):  # noqa: N818 (it ends `_forward` where that is half done; nothing is wrong)
    """Carries the arguments of `generate`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class _StandIn:
    """A model with another `generate`; everything else is the model's."""

    def __init__(self, model: Any, generate: Any) -> None:
        self._model, self.generate = model, generate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class GenerateCall:
    """One call of `generate` that a pipeline wants to make.

    Attributes:
        input_ids: int64 `[1, length]`, padding included; None for an empty prompt, as the pipeline has it.
        prompt: The tokens without padding; of an empty prompt the token that `generate` begins with.
        options: All other arguments, with lengths that do not count the padding.
        generation_config: Where `generate` looks up options that are not given: the call's, then the model's.
    """

    input_ids: torch.Tensor | None
    prompt: list[int]
    options: dict[str, Any]
    generation_config: list[Any]

    @classmethod
    def of(cls, pipe: Pipeline, model_inputs: Any, parameters: dict[str, Any]) -> "GenerateCall":
        """What `pipe` asks for one preprocessed input.

        Raises:
            InvalidRequestError: It asks for what a batcher cannot answer.
        """
        try:
            _forward(pipe, _ask, model_inputs, parameters)
        except _Asked as asked:
            options = asked.arguments
        else:
            raise InvalidRequestError(f"{type(pipe).__name__}._forward does not call model.generate: nothing to batch.")
        ids, mask = options.pop("input_ids", None), options.pop("attention_mask", None)
        if ids is not None and len(ids) != 1:
            raise InvalidRequestError(f"one input became {len(ids)} rows of tokens: one is needed.")
        configs = [options.get("generation_config"), pipe.model.generation_config]
        call = cls(ids, _shown(ids, mask) if ids is not None else [], options, configs)
        if ids is None:
            call.prompt.append(call._first_token())
        call._leave_out_padding()
        if call.option("return_dict_in_generate") and call._num_beams > 1:
            raise InvalidRequestError(
                f"return_dict_in_generate=True with num_beams={call._num_beams} cannot be honoured: a batcher keeps no "
                "beam_indices."
            )
        return call

    def option(self, name: str) -> Any:
        """What `generate` takes for an option; None if nobody says."""
        sources = [self.options.get(name), *(getattr(config, name, None) for config in self.generation_config)]
        return next((value for value in sources if value is not None), None)

    def outputs(self, pipe: Pipeline, model_inputs: Any, parameters: dict[str, Any], output: RequestOutput) -> Any:
        """What the pipeline's `forward` would have returned, for its `postprocess`."""
        return _forward(pipe, lambda *_, **__: self._answer(output), model_inputs, parameters)

    def _answer(self, output: RequestOutput) -> Any:
        """What `generate` would have returned: int64 `[num_sequences, length]`, or its `ModelOutput`."""
        rows = output.sequences or [output.generated_tokens]
        head = self.prompt if self.input_ids is None else self.input_ids[0].tolist()
        width = max(map(len, rows))
        fill = self._fill() if any(len(row) < width for row in rows) else 0
        sequences = torch.tensor([head + row + [fill] * (width - len(row)) for row in rows])
        if self.option("return_dict_in_generate"):
            parts: dict[str, Any] = {"sequences": sequences, "scores": output.scores, "logits": output.logits}
            return GenerateDecoderOnlyOutput(**parts)
        return sequences

    @property
    def _num_beams(self) -> int:
        return self.option("num_beams") or 1

    def _fill(self) -> int:
        """What `generate` writes behind sequences that are shorter than others; its beam search reads 0 as nothing."""
        pad, eos = self.option("pad_token_id"), self.option("eos_token_id")
        first = eos[0] if isinstance(eos, (list, tuple)) else eos
        choices = [pad or None if self._num_beams > 1 else pad, first, 0]
        return next(int(token) for token in choices if token is not None)

    def _first_token(self) -> int:
        bos = self.option("bos_token_id")
        if bos is None:
            raise InvalidRequestError(
                "the prompt is empty and there is no bos_token_id: give a prompt, or bos_token_id=."
            )
        return int(bos)

    def _leave_out_padding(self) -> None:
        """`generate` counts padding where it counts the prompt."""
        padding = 0 if self.input_ids is None else self.input_ids.shape[1] - len(self.prompt)
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = self.option(total)
            if padding and length and self.option(new) is None:
                self._set(total, max(length - padding, 0))

    def _set(self, name: str, value: Any) -> None:
        """Where it was said: `generate` deprecates options beside a `generation_config`."""
        config = self.options.get("generation_config")
        if name in self.options or config is None:
            self.options[name] = value
        else:
            self.options["generation_config"] = copy.deepcopy(config)
            setattr(self.options["generation_config"], name, value)


def _forward(pipe: Pipeline, generate: Any, model_inputs: Any, parameters: dict[str, Any]) -> Any:
    """The pipeline's `forward`, with another `generate`; the pipeline itself stays as it is."""
    stand_in = copy.copy(pipe)
    stand_in.model = _StandIn(pipe.model, generate)  # type: ignore[assignment]
    return stand_in.forward(model_inputs, **parameters)


def _ask(inputs: Any = None, **arguments: Any) -> None:
    raise _Asked(arguments if inputs is None else {"input_ids": inputs, **arguments})


def _shown(ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    return list((ids[0] if mask is None else ids[0][mask[0] != 0]).tolist())
