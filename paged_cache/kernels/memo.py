"""What kernels keep in the `memo` of a step."""

REPEAT = "repeat"
"""A function of `query`, `key_cache` and `value_cache` that does the last call again with these tensors if it was one of no
other tensors, or returns None: layers of a step differ in nothing else."""
