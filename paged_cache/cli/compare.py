"""`paged-cache compare`."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidRequestError
from .errors import readable_errors

Numbers = list[str] | None

_Model = Annotated[
    str, typer.Option(help="Model to try: an id on the hub, or a folder.", show_default="the model in the package")
]
_Prompt = Annotated[
    list[str] | None, typer.Option(help="A prompt; repeat it for more.", show_default="pieces of Python's library")
]
_PromptsFile = Annotated[
    Path | None, typer.Option(help="File with a prompt per line, or a JSON list of prompts.", show_default=False)
]
_MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to generate per prompt.", show_default="32")]
_BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Rows of the largest batch.", show_default="as many as prompts, or 8")
]
_Contexts = Annotated[
    Numbers,
    typer.Option(
        help="Lengths in tokens of prompts whose latency is measured, with commas.", show_default="128,512,2048"
    ),
]
_Concurrency = Annotated[
    Numbers,
    typer.Option(help="Numbers of requests that are served at once, with commas.", show_default="1,2,4,8,16,32"),
]
_InputLen = Annotated[
    int | None, typer.Option(help="Tokens of the longest prompt, where none are given.", show_default="192")
]
_Dtype = Annotated[
    str, typer.Option(help="Type of the model: float32, bfloat16 or float16; tokens are exact in the first.")
]
_Rounds = Annotated[
    int | None, typer.Option(help="Rounds that are timed; in each, all candidates take turns.", show_default="3")
]
_Quick = Annotated[
    bool,
    typer.Option("--quick", help="Run everything small, in seconds: are the tokens right? Figures say nothing then."),
]


def compare(
    model: _Model = "",
    prompt: _Prompt = None,
    prompts_file: _PromptsFile = None,
    max_new_tokens: _MaxNewTokens = None,
    batch_size: _BatchSize = None,
    contexts: _Contexts = None,
    concurrency: _Concurrency = None,
    no_concurrency: Annotated[bool, typer.Option("--no-concurrency", help="Compare the caches only.")] = False,
    input_len: _InputLen = None,
    device: Annotated[str, typer.Option(help="Device of the model: cpu or cuda.")] = "cpu",
    dtype: _Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the prompts' lengths and of random tokens.")] = 0,
    rounds: _Rounds = None,
    time_budget: Annotated[float, typer.Option(help="Most seconds for the measurements over the context.")] = 30.0,
    quick: _Quick = False,
    output: Annotated[Path, typer.Option(help="Folder for compare.json, compare.png and compare.html.")] = Path("out"),
) -> None:
    """The same prompts through every KV cache, and through every way to serve many at once: time, memory, tokens."""
    from rich.console import Console

    from ..compare.report import run
    from ..compare.settings import make_settings

    with readable_errors():
        settings = make_settings(
            quick,
            model=model,
            prompts=[*(prompt or []), *read_prompts(prompts_file)],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            contexts=numbers("--contexts", contexts),
            concurrency=() if no_concurrency else numbers("--concurrency", concurrency),
            input_len=input_len,
            device=device,
            dtype=dtype,
            seed=seed,
            rounds=rounds,
            time_budget=time_budget,
        )
        is_right = run(settings, output, shlex.join(["paged-cache", *sys.argv[1:]]), Console(highlight=False))
    raise typer.Exit(0 if is_right else 1)


def numbers(option: str, texts: Numbers) -> list[int] | None:
    """`["1,2", "4"]` as `[1, 2, 4]`; None if the option was not given.

    Raises:
        InvalidRequestError: Something else is in there.
    """
    if not texts:
        return None
    try:
        return [int(text) for text in re.split(r"[,\s]+", ",".join(texts).strip(", "))]
    except ValueError as error:
        raise InvalidRequestError(f"{option} is {' '.join(texts)!r}; give whole numbers, such as 128,512.") from error


def read_prompts(path: Path | None) -> list[str]:
    """Lines that are not empty, or a JSON list of strings.

    Raises:
        InvalidRequestError: There is no such file, or there are no prompts in it.
    """
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        found: Any = (
            json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"cannot read --prompts-file {path}: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and one for one in found):
        raise InvalidRequestError(f"{path} has no prompts: give one per line, or a JSON list of texts.")
    return found
