"""What `paged-cache compare` does: the same prompts through every cache, and through every way to serve many at once."""
