"""Attention over blocks, and what moves blocks, on CUDA."""
