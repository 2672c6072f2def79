"""Shows that prepacked layers ran on their packed copies."""

from paged_cache import prepacking


def count_packed_calls(monkeypatch):
    """Numbers of rows that the packed path was called with."""
    found = []
    real = prepacking.linear_with_packed

    def counted(x, packed, bias):
        found.append(x.numel() // x.shape[-1])
        return real(x, packed, bias)

    monkeypatch.setattr(prepacking, "linear_with_packed", counted)
    return found
