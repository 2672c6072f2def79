"""The `paged-cache` command; a module per subcommand. What they import is imported when they run: help is to be quick."""

from importlib import metadata
from typing import Annotated

import typer

from . import bench
from .compare import compare
from .demo import demo
from .plan import plan

app = typer.Typer(
    name="paged-cache",
    help="Paged, prefix-sharing KV cache for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(compare)
app.command()(plan)
app.add_typer(bench.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            version = metadata.version("paged-cache")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        typer.echo(f"paged-cache {version}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Paged, prefix-sharing KV cache for Hugging Face transformers."""
