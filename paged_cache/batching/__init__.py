"""Many requests on one model and one pool: who is next, and how they run together."""
