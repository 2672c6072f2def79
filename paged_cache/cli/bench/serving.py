"""`paged-cache bench throughput` and `paged-cache bench serve`."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import readable_errors
from .shared import earlier, finish
from .typed import given, several, tick, typed

if TYPE_CHECKING:
    from ...bench.serving.comparing import Settings
    from ...bench.serving.datasets import Dataset

QUICK_PROMPTS, QUICK_FACTOR = 8, 20.0

Model = Annotated[
    str | None,
    typer.Option(
        help="Model: 28m, tiny or 8b (random weights), shipped, an id on the hub, or a folder.", show_default="28m"
    ),
]
DatasetName = Annotated[
    str, typer.Option(help="Where requests are from: trace, random, prefix_repetition, sharegpt or custom.")
]
DatasetPath = Annotated[Path | None, typer.Option(help="File for sharegpt (JSON) or custom (lines of JSON).")]
NumPrompts = Annotated[int | None, typer.Option(min=1, help="Number of requests.", show_default="64")]
Factor = Annotated[
    float | None, typer.Option(help="Number by which the lengths of the trace are divided.", show_default="5")
]
RandomInputLen = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a prompt, of the random dataset.", show_default="1024")
]
RandomOutputLen = Annotated[
    int | None, typer.Option(min=1, help="Tokens of an answer, of the random dataset.", show_default="128")
]
RandomRangeRatio = Annotated[
    float | None, typer.Option(help="Share by which lengths vary, of the random dataset.", show_default="0")
]
PrefixLen = Annotated[
    int | None,
    typer.Option(
        "--prefix-repetition-prefix-len",
        min=1,
        help="Tokens of a prefix, of the prefix_repetition dataset.",
        show_default="256",
    ),
]
SuffixLen = Annotated[
    int | None,
    typer.Option(
        "--prefix-repetition-suffix-len",
        min=1,
        help="Tokens behind a prefix, of the prefix_repetition dataset.",
        show_default="256",
    ),
]
NumPrefixes = Annotated[
    int | None,
    typer.Option(
        "--prefix-repetition-num-prefixes",
        min=1,
        help="Number of prefixes, of the prefix_repetition dataset.",
        show_default="10",
    ),
]
PrefixOutputLen = Annotated[
    int | None,
    typer.Option(
        "--prefix-repetition-output-len",
        min=1,
        help="Tokens of an answer, of the prefix_repetition dataset.",
        show_default="128",
    ),
]
SharegptOutputLen = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of an answer, of the sharegpt dataset.", show_default="that of the answer in the file"
    ),
]
CustomOutputLen = Annotated[
    int | None,
    typer.Option(
        min=-1, help="Tokens of an answer, of the custom dataset; -1: output_tokens in the file.", show_default="256"
    ),
]
SkipChatTemplate = Annotated[
    bool, typer.Option("--skip-chat-template", help="Take prompts as they are, of the custom dataset.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Candidates. The first one is the reference; if it is ours, in float32, a loop that is not timed. Repeatable, or with commas."
    ),
]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds that are timed.", show_default="3")]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most requests that run at a time in our batcher.",
        show_default="64 on a CPU, else the batcher's own",
    ),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most tokens of a step of our batcher.", show_default="1024 on a CPU, else the batcher's own"
    ),
]
Room = Annotated[float, typer.Option(help="Size of our pool, as a multiple of what all requests need at once.")]
Peer = Annotated[
    list[str] | None,
    typer.Option(
        help="Engine in an environment of its own to measure besides: vllm, which does not tell how much of its KV memory requests use. Repeatable."
    ),
]
PeerPython = Annotated[Path | None, typer.Option(help="Interpreter that can import the peer.", show_default="this one")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.", show_default="torch's own")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(help="Type of the model: float32, bfloat16 or float16; only in float32 are equal tokens demanded."),
]
Seed = Annotated[int, typer.Option(help="Seed of weights, tokens and arrivals.")]
Quick = Annotated[bool, typer.Option("--quick", help="Run a tiny model, few short requests, one round: is it right.")]
Add = Annotated[bool, typer.Option("--add", help="Add to the rounds that the JSON file has, of equal settings.")]
OutputJson = Annotated[Path | None, typer.Option(help="JSON file for the results.")]


def throughput(
    model: Model = None,
    dataset_name: DatasetName = "trace",
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = None,
    shared_prefix_len: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Tokens that all prompts start with. Repeatable, a table each.", show_default="0, 256"
        ),
    ] = None,
    factor: Factor = None,
    random_input_len: RandomInputLen = None,
    random_output_len: RandomOutputLen = None,
    random_range_ratio: RandomRangeRatio = None,
    prefix_len: PrefixLen = None,
    suffix_len: SuffixLen = None,
    num_prefixes: NumPrefixes = None,
    prefix_output_len: PrefixOutputLen = None,
    sharegpt_output_len: SharegptOutputLen = None,
    custom_output_len: CustomOutputLen = None,
    skip_chat_template: SkipChatTemplate = False,
    only: Only = None,
    padded_size: Annotated[int, typer.Option(min=1, help="Requests in a padded batch.")] = 8,
    rounds: Rounds = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    room: Room = 1.0,
    peer: Peer = None,
    peer_python: PeerPython = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    quick: Quick = False,
    add: Add = False,
    output_json: OutputJson = None,
) -> None:
    """Requests that are all there at the beginning: this package's batcher, a loop, padded batches, generate_batch, vLLM."""
    options = dict(locals())
    with readable_errors():
        from ...bench.serving.throughput import run

        settings, dataset = replace(_settings(options), padded_size=padded_size), _dataset(options)
        shared = tuple(dict.fromkeys(shared_prefix_len or (0, 256)))
        found = run(settings, dataset, shared, earlier=earlier(add, output_json), command=typed(), tick=tick)
        finish(found, output_json, quick)


_Burstiness = Annotated[
    float, typer.Option(help="How evenly requests come: 1 is a Poisson process, less is in bursts, more is evenly.")
]
_MaxConcurrency = Annotated[
    int | None, typer.Option(min=1, help="Most requests that are under way at a time.", show_default="any number")
]
_Goodput = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:MS",
        help="Objective in milliseconds that a good request meets: ttft:200, tpot:50 or e2el:2000. Repeatable.",
    ),
]


def serve(
    model: Model = None,
    dataset_name: DatasetName = "trace",
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = None,
    request_rate: Annotated[float, typer.Option(help="Requests that come in a second; inf: all at once.")] = math.inf,
    burstiness: _Burstiness = 1.0,
    max_concurrency: _MaxConcurrency = None,
    goodput: _Goodput = None,
    percentile_metrics: Annotated[str, typer.Option(help="Latencies to show, with commas.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to show, with commas.")] = "99",
    shared_prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that all prompts start with.")] = 0,
    factor: Factor = None,
    random_input_len: RandomInputLen = None,
    random_output_len: RandomOutputLen = None,
    random_range_ratio: RandomRangeRatio = None,
    prefix_len: PrefixLen = None,
    suffix_len: SuffixLen = None,
    num_prefixes: NumPrefixes = None,
    prefix_output_len: PrefixOutputLen = None,
    sharegpt_output_len: SharegptOutputLen = None,
    custom_output_len: CustomOutputLen = None,
    skip_chat_template: SkipChatTemplate = False,
    only: Only = None,
    rounds: Rounds = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    room: Room = 1.0,
    peer: Peer = None,
    peer_python: PeerPython = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    quick: Quick = False,
    add: Add = False,
    output_json: OutputJson = None,
) -> None:
    """Requests that come over time: how long they wait with each policy, with generate_batch, in a loop, and with vLLM."""
    options = dict(locals())
    with readable_errors():
        from ...bench.serving.metrics import Wanted
        from ...bench.serving.serve import Traffic, run

        wanted = Wanted.parse(percentile_metrics, metric_percentiles, goodput or [])
        traffic = Traffic(request_rate, burstiness, max_concurrency, shared_prefix_len, wanted)
        found = run(
            _settings(options),
            _dataset(options),
            traffic,
            earlier=earlier(add, output_json),
            command=typed(),
            tick=tick,
        )
        finish(found, output_json, quick)


def _settings(options: dict[str, object]) -> "Settings":
    """Of options of both commands; `--quick` fills what is not given."""
    from ...bench.serving.comparing import Settings

    quick = options["quick"]
    names = ("device", "dtype", "threads", "seed", "max_num_seqs", "max_num_batched_tokens", "room")
    return Settings(
        **{name: options[name] for name in names},  # type: ignore[arg-type]
        model=options["model"] or ("tiny" if quick else "28m"),  # type: ignore[arg-type]
        rounds=options["rounds"] or (1 if quick else 3),  # type: ignore[arg-type]
        only=tuple(several(options["only"])),  # type: ignore[arg-type]
        peers=tuple(several(options["peer"])),  # type: ignore[arg-type]
        peer_python=options["peer_python"] or Path(sys.executable),  # type: ignore[arg-type]
    )


def _dataset(options: dict[str, object]) -> "Dataset":
    """The same."""
    from ...bench.serving.datasets import Dataset

    names = ("dataset_path", "num_prompts", "factor", "random_input_len", "random_output_len", "random_range_ratio")
    prefixes = {"prefix_len": "prefix_len", "suffix_len": "suffix_len", "num_prefixes": "num_prefixes"}
    prefixes |= {"prefix_output_len": "output_len"}
    texts = ("sharegpt_output_len", "custom_output_len")
    own = given(
        **{name: options[name] for name in (*names, *texts)},
        **{f"prefix_repetition_{theirs}": options[ours] for ours, theirs in prefixes.items()},
        skip_chat_template=options["skip_chat_template"] or None,
    )
    name = str(options["dataset_name"])
    small: dict[str, object] = {"num_prompts": QUICK_PROMPTS} if options["quick"] else {}
    if options["quick"] and name == "trace":
        small["factor"] = QUICK_FACTOR
    return Dataset.of(name, **small | own)
