"""Attention over blocks: tensors in, tensor out."""

from . import ops
from .dispatch import paged_attention

__all__ = ["ops", "paged_attention"]
