"""Errors of commands: one line for what the user can mend, a traceback for what is a mistake of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import PagedCacheError


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the command with exit code 1 and one line if an error of this package is raised inside."""
    try:
        yield
    except PagedCacheError as error:
        typer.echo(f"paged-cache: {error}", err=True)
        raise typer.Exit(1) from error
