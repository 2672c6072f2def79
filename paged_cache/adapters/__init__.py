"""peft's adapters inside a model: which there are, and how rows of one batch get different ones. Never imports peft itself."""
