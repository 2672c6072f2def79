"""Who owns which block: bookkeeping in plain Python, and the tensors behind it."""
