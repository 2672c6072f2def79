"""Attention over blocks: tensors in, tensor out."""

from . import ops
from .dispatch import copy_blocks, paged_attention, write_kv

__all__ = ["copy_blocks", "ops", "paged_attention", "write_kv"]
