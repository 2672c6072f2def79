"""Libraries that the package can do without: what to say where one is missing."""

import importlib

_EXTRAS = {"matplotlib": "plots", "prometheus_client": "metrics", "rich": "cli", "typer": "cli"}
"""Of the libraries that the package can do without, the extra that each belongs to."""


def not_installed(library: str) -> str:
    """What to say where an optional library is missing; the package may be a wheel or a checkout."""
    return (
        f"{library} is not installed: pip install {library}, "
        f"or in a checkout of paged-cache pip install '.[{_EXTRAS[library]}]'"
    )


def require(library: str) -> None:
    """Imports an optional library.

    Raises:
        ModuleNotFoundError: It is not installed; the message says what to install.
    """
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(not_installed(library), name=library) from None
