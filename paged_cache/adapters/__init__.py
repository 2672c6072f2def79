"""peft's adapters inside a model: which there are, and how rows of one batch get different ones. Never imports peft itself."""

BASE = "__base__"
"""peft's name for the model without an adapter."""
