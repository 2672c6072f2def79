"""`paged-cache plan`."""

import json
from typing import Annotated

import typer

from ..errors import InvalidRequestError
from .errors import readable_errors

_Memory = Annotated[
    str,
    typer.Option(
        help="Memory for weights, K and V and all else: '24GiB', '80GB', bytes, or a share of what is free here ('0.9').",
        show_default="all that is free on this machine: its GPU, or its RAM",
    ),
]
_Trace = Annotated[
    str,
    typer.Option(
        help="Lengths of requests: a CSV file with columns prompt and output, or 'azure': 256 conversations in the package.",
        show_default="azure, scaled to the context",
    ),
]
_TraceScale = Annotated[
    float | None, typer.Option(help="Number by which the lengths of --trace are divided.", show_default="1")
]
_WeightsMemory = Annotated[
    str, typer.Option(help="Memory that the weights take, such as '16GB'.", show_default="computed from the config")
]
_Context = Annotated[
    int | None,
    typer.Option(help="Tokens that contiguous memory reserves for each row.", show_default="the model's longest"),
]
_PromptLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of each prompt, where all requests are equal.",
        show_default="mixed lengths; with --output-len 512",
    ),
]
_OutputLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of each output, where all requests are equal.",
        show_default="mixed lengths; with --prompt-len 128",
    ),
]
_SharedPrefixLen = Annotated[
    int, typer.Option(help="Tokens that all prompts start with, before those of --prompt-len or the trace.")
]
_KvDtype = Annotated[str, typer.Option(help="Type in which K and V are stored: auto (the model's), int8 or fp8_e4m3.")]
_Dtype = Annotated[
    str, typer.Option(help="Type in which the model computes: float16, bfloat16, float32, or auto, the config's.")
]
_Overhead = Annotated[float, typer.Option(help="Share of the memory that is kept for activations and the like.")]


def plan(
    model: Annotated[str, typer.Argument(help="Id on the hub, a folder, or a config.json. Only the config is read.")],
    memory: _Memory = "",
    dtype: _Dtype = "auto",
    kv_dtype: _KvDtype = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block, a power of two.")] = 16,
    weights_memory: _WeightsMemory = "",
    weights: Annotated[bool, typer.Option(help="Count the weights in this memory, or leave them out.")] = True,
    overhead: _Overhead = 0.1,
    context: _Context = None,
    prompt_len: _PromptLen = None,
    output_len: _OutputLen = None,
    trace: _Trace = "",
    trace_scale: _TraceScale = None,
    shared_prefix_len: _SharedPrefixLen = 0,
    num_beams: Annotated[int, typer.Option(help="Rows of each request: beams or answers to one prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """How many tokens and requests fit into a memory: from a model's config alone, weights included."""
    from rich.console import Console

    from ..planning import plan as make_plan
    from ..planning import read_trace
    from .plan_tables import show

    with readable_errors():
        if trace_scale is not None and not trace:
            raise InvalidRequestError(f"--trace-scale is {trace_scale}, but there is no --trace that it divides.")
        made = make_plan(
            model,
            memory=memory or None,
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=block_size,
            weights_memory=weights_memory or None,
            with_weights=weights,
            overhead=overhead,
            context=context,
            prompt_len=prompt_len,
            output_len=output_len,
            requests=read_trace(trace, 1.0 if trace_scale is None else trace_scale) if trace else None,
            shared_prefix_len=shared_prefix_len,
            num_beams=num_beams,
        )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        show(made, model, Console(highlight=False))
