"""`paged_pipeline`: transformers' text-generation pipeline, batched without padding."""

from typing import Any

from transformers import Pipeline, TextGenerationPipeline

from paged_cache import BlockPool, InvalidRequestError, Policy

from .pipeline_settings import CALL_OPTIONS, REFUSED, SETTINGS
from .text_generation import PagedTextGenerationPipeline, PipelineTimeoutError

__all__ = ["PagedTextGenerationPipeline", "PipelineTimeoutError", "paged_pipeline"]


def paged_pipeline(
    pipe: Pipeline,
    pool: BlockPool | None = None,
    policy: str | Policy = "sjf",
    *,
    memory: int | float | str | None = None,
    **settings: Any,
) -> PagedTextGenerationPipeline:
    """A pipeline with the model, tokenizer and settings of `pipe` that batches without padding; `pipe` stays as it is.

    Its class is `PagedTextGenerationPipeline` over that of `pipe`, whose own `preprocess` and `postprocess` are used.

    Args:
        pipe: A text-generation pipeline.
        pool, policy, memory: See `PagedTextGenerationPipeline`.
        **settings: Of `ContinuousBatcher` (`max_num_seqs`, ...), and options for all calls (`read_ahead`, ...).

    Raises:
        InvalidRequestError: `pipe` is of another kind, or a setting is wrong.
        UnsupportedModelError: See `PagedTextGenerationPipeline`.
    """
    if not isinstance(pipe, TextGenerationPipeline) or isinstance(pipe, PagedTextGenerationPipeline):
        task = getattr(pipe, "task", None)
        raise InvalidRequestError(
            f"pipe is a {type(pipe).__name__} of task {task!r}: pipeline('text-generation', model=...) is needed."
        )
    unknown = sorted(settings.keys() - SETTINGS - CALL_OPTIONS)
    if unknown:
        known = ", ".join(sorted({"pool", "policy", "memory"} | SETTINGS - REFUSED | CALL_OPTIONS))
        raise InvalidRequestError(f"{unknown[0]}={settings[unknown[0]]!r}: no setting; known are {known}.")
    paged = _paged_class(type(pipe)).__new__(_paged_class(type(pipe)))
    vars(paged).update(vars(pipe))
    paged._forward_params = {
        **pipe._forward_params,
        **{name: settings.pop(name) for name in CALL_OPTIONS & settings.keys()},
    }
    paged._open(pool, policy, memory, settings)
    return paged


def _paged_class(kind: type[TextGenerationPipeline]) -> type[PagedTextGenerationPipeline]:
    if kind is TextGenerationPipeline:
        return PagedTextGenerationPipeline
    reads_text_only = kind.preprocess is TextGenerationPipeline.preprocess
    return type(f"Paged{kind.__name__}", (PagedTextGenerationPipeline, kind), {"_reads_text_only": reads_text_only})
