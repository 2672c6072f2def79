"""Values as text, for messages and tables."""


def shown(value: object, most: int = 100) -> str:
    """A value in a message: its `repr` in one line of at most so many characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def format_bytes(count: float) -> str:
    """In the binary unit that suits: 524288 -> "512 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
