"""Paged caches in other people's interfaces: pipelines, adapters. Built on the public names of `paged_cache` only."""

from .pipeline import PagedTextGenerationPipeline, paged_pipeline

__all__ = ["PagedTextGenerationPipeline", "paged_pipeline"]
