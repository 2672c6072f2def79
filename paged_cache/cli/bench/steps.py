"""`paged-cache bench decode`, `latency` and `startup`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import readable_errors
from .shared import finish
from .typed import device_and_dtype, given, numbers, several, tick, typed

Device = Annotated[
    str | None, typer.Option(help="Device of the model: cpu or cuda.", show_default="cuda where there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of the model: float32, bfloat16 or float16.", show_default="float32, on CUDA bfloat16"),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and tokens.")]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Run small and short, but for what is given: does it run, are the answers right? Goals are not judged.",
    ),
]
Output = Annotated[Path | None, typer.Option(help="JSON file for the results.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.", show_default="torch's own")]
NAMES = "shipped, tiny, 28m, 8b (random weights), an id on the hub, or a folder."


def decode(
    model: Annotated[str, typer.Option(help=f"Model: layers (two, little but attention), {NAMES}")] = "28m",
    batch_sizes: Annotated[
        str | None, typer.Option(help="Rows of the batch, with commas.", show_default="1,8,32; quick 1,2")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Tokens in the cache, with commas.", show_default="128,512,2048,8192; quick 128")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Seconds for each batch size and context.", show_default="6; quick 0.1")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="Memory for caches, in GiB.", show_default="60 % of what is free")
    ] = None,
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also measure a compiled model with a static cache, on CUDA.")
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of the CPU; two wait for each other on a busy machine.")
    ] = 1,
    seed: Seed = 0,
    quick: Quick = False,
    output_json: Output = None,
) -> None:
    """A decode step over batch size and context: PagedCache against DynamicCache and StaticCache."""
    from ...bench.decode import QUICK, Settings, run

    where = device_and_dtype(device, dtype)
    sizes, lengths = (numbers(text) if text is not None else None for text in (batch_sizes, contexts))
    own = given(batch_sizes=sizes, contexts=lengths, seconds=seconds, memory=memory)
    small = QUICK if quick else {}
    settings = Settings(model, *where, threads=threads, seed=seed, compiles=compiles, **small | own)
    with readable_errors():
        found = run(settings, typed(), tick, lambda part: part.save(output_json) if output_json else None)
    finish(found, output_json, quick)


def latency(
    input_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt.", show_default="32; quick 8")
    ] = None,
    output_len: Annotated[
        int | None, typer.Option(min=2, help="New tokens of each prompt.", show_default="128; quick 8")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts in the batch.", show_default="8; quick 2")
    ] = None,
    num_iters: Annotated[int | None, typer.Option(min=1, help="Rounds that count.", show_default="10; quick 2")] = None,
    num_iters_warmup: Annotated[
        int | None, typer.Option(min=0, help="Rounds before them, which do not count.", show_default="2; quick 1")
    ] = None,
    model: Annotated[str, typer.Option(help=f"Model: {NAMES}")] = "28m",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Peers to measure besides: static, generate_batch; repeatable.", show_default="all there are"
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    quick: Quick = False,
    output_json: Output = None,
) -> None:
    """One batch of prompts: generate with each cache, our batcher and transformers'."""
    from ...bench.latency import QUICK, Settings, run

    device, dtype = device_and_dtype(device, dtype)
    own = given(input_len=input_len, output_len=output_len, batch_size=batch_size, num_iters=num_iters)
    own |= given(num_iters_warmup=num_iters_warmup, threads=threads, peers=several(peer) or None)
    settings = Settings(model=model, device=device, dtype=dtype, seed=seed, **(QUICK if quick else {}) | own)
    with readable_errors():
        found = run(settings, typed(), tick)
    finish(found, output_json, quick)


def startup(
    model: Annotated[str, typer.Option(help="Model to load: shipped, an id on the hub, or a folder.")] = "shipped",
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes of each kind that are timed; one more goes before.", show_default="5; quick 2"
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Time two processes of each kind only.")] = False,
    output_json: Output = None,
) -> None:
    """From the first import to the first token, in fresh processes."""
    from ...bench.startup import Settings, run

    where = device_and_dtype(device, dtype)
    settings = Settings(model, *where, rounds or (2 if quick else 5), threads, seed)
    with readable_errors():
        found = run(settings, typed(), tick)
    finish(found, output_json, quick)
