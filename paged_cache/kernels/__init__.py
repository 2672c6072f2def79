"""Attention over blocks: tensors in, tensor out."""

from .dispatch import paged_attention

__all__ = ["paged_attention"]
