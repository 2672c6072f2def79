"""Attention over blocks against what the machine can do, and against attention without blocks."""
