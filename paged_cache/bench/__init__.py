"""Measurements: what `paged-cache bench` and `paged-cache compare` run, and the report made of their results."""
