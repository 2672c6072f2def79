"""Paged caches in other people's interfaces: pipelines, adapters. Built on the public names of `paged_cache` only."""

from .lora import adapter_folders
from .pipeline import PagedTextGenerationPipeline, PipelineTimeoutError, paged_pipeline

__all__ = ["PagedTextGenerationPipeline", "PipelineTimeoutError", "adapter_folders", "paged_pipeline"]
