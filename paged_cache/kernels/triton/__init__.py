"""Attention over blocks, and what moves blocks, on CUDA."""

from .attention import paged_attention, supports

__all__ = ["paged_attention", "supports"]
