"""Paged caches in other people's interfaces: pipelines, adapters. Built on the public names of `paged_cache` only."""
