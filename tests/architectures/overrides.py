"""What the tiny config of one model type needs besides the general sizes, by the model type of the (sub-)config."""

OVERRIDES: dict[str, dict] = {}
