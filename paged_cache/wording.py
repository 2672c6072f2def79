"""Values as text, for messages and tables."""


def shown(value: object, most: int = 100) -> str:
    """A value in a message: its `repr` in one line of at most so many characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def format_bytes(count: float, decimals: int | None = None) -> str:
    """In the binary unit that suits: 524288 -> "512 KiB", with `decimals=1` "512.0 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    number = f"{value:.4g}" if decimals is None or unit == "B" else f"{value:.{decimals}f}"
    return f"{number} {unit}"
