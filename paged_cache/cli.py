"""The `paged-cache` command."""

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .assets import MODEL_PATH
from .demo_report import run
from .errors import PagedCacheError

app = typer.Typer(
    name="paged-cache",
    help="Paged, prefix-sharing KV cache for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="Id on the hub, or a folder.", show_default="the model in the package")
    ] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeat it for a batch.", show_default="some beginnings of code")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 48,
    output: Annotated[Path, typer.Option(help="Folder for the picture of the pool.")] = Path("out"),
) -> None:
    """Generate with a paged cache, compare with transformers' own caches, draw the pool. Runs on the CPU."""
    console = Console(highlight=False)
    try:
        is_identical = run(model or MODEL_PATH, prompt or [], max_new_tokens, output, console)
    except PagedCacheError as error:
        typer.echo(f"paged-cache: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if is_identical else 1)
