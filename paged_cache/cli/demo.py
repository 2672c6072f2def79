"""`paged-cache demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import readable_errors


def demo(
    model: Annotated[
        str, typer.Option(help="Model to try: an id on the hub, or a folder.", show_default="the model in the package")
    ] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeat it for a batch.", show_default="some beginnings of code")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 48,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the page of the pool.")] = Path("out"),
) -> None:
    """Generate with a paged cache, compare with transformers' own caches, draw the pool. Runs on the CPU."""
    from rich.console import Console

    from ..assets import MODEL_PATH
    from ..demo_report import run

    console = Console(highlight=False)
    with readable_errors():
        is_identical = run(model or MODEL_PATH, prompt or [], max_new_tokens, output, console)
    raise typer.Exit(0 if is_identical else 1)
