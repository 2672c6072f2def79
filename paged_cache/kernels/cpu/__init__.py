"""Attention over blocks, and what moves blocks, on the CPU: compiled with numba, run on the threads of torch."""

from .attention import paged_attention, supports

__all__ = ["paged_attention", "supports"]
