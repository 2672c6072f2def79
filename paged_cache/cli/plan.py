"""`paged-cache plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import readable_errors

_Memory = Annotated[
    str,
    typer.Option(
        help="For everything: '24GiB', '80GB', bytes, or a share of what is free here ('0.9').", show_default="all"
    ),
]
_Trace = Annotated[
    str,
    typer.Option(
        help="Instead of two lengths, a CSV file with columns prompt and output; 'azure' for 256 conversations in the package.",
        show_default=False,
    ),
]


def plan(
    model: Annotated[str, typer.Argument(help="Id on the hub, a folder, or a config.json. Only the config is read.")],
    memory: _Memory = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32, or auto: the config's.")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="In which K and V are stored: auto, int8 or fp8_e4m3.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    weights_memory: Annotated[
        str, typer.Option(help="What the weights take.", show_default="computed from the config")
    ] = "",
    weights: Annotated[bool, typer.Option(help="Whether the weights are in this memory.")] = True,
    overhead: Annotated[float, typer.Option(help="Share of the memory kept for activations and the like.")] = 0.1,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that contiguous memory reserves per row.", show_default="the model's longest"),
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt.", show_default="512, half a short context")
    ] = None,
    output_len: Annotated[
        int | None, typer.Option(help="Tokens of an output.", show_default="128, a quarter of a short context")
    ] = None,
    trace: _Trace = "",
    trace_scale: Annotated[float, typer.Option(help="Divides the lengths of the trace.")] = 1.0,
    shared_prefix_len: Annotated[
        int, typer.Option(help="Tokens that all prompts start with, before those of --prompt-len or the trace.")
    ] = 0,
    num_beams: Annotated[int, typer.Option(help="Rows of a request.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """How many tokens and requests fit into a memory: from a model's config alone, weights included."""
    from rich.console import Console

    from ..planning import plan as make_plan
    from ..planning import read_trace
    from .plan_tables import show

    with readable_errors():
        made = make_plan(
            Path(model).expanduser() if model.startswith("~") else model,
            memory=_share_or_size(memory),
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=block_size,
            weights_memory=weights_memory or None,
            with_weights=weights,
            overhead=overhead,
            context=context,
            prompt_len=prompt_len,
            output_len=output_len,
            requests=read_trace(trace, trace_scale) if trace else None,
            shared_prefix_len=shared_prefix_len,
            num_beams=num_beams,
        )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        show(made, model, Console(highlight=False))


def _share_or_size(memory: str) -> str | float | None:
    """A number up to 1 is a share of the free memory; anything else is a size."""
    try:
        return float(memory) if float(memory) <= 1 else memory
    except ValueError:
        return memory or None
