"""Many requests at once, and requests over time: this package's batcher and its peers."""
