"""What kernels keep in the `memo` of a step."""

REPEAT = "repeat"
"""With `scale`, `window`, `chunk` and `softcap` the key of a function that does the last such call again with another query,
other keys and values; None if it was another call. It was one without sinks, biases and scales."""
