"""A plan in the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from ..planning import Plan, Way
from ..wording import format_bytes

WORDS = {
    "contiguous": "contiguous: each row reserves the context (StaticCache)",
    "padded": "padded batch: rows as long as the longest, all at once (DynamicCache)",
    "paged": "paged: blocks for the tokens that are there (BlockPool)",
    "one pass": "paged, in one call of generate: prompts are read whole, also by layers with a window (PagedCache)",
}
CHUNKS = ", prompts read in chunks (ContinuousBatcher)"
"""What the number of requests in blocks rests on where layers have windows."""


def show(plan: Plan, name: str, console: Console) -> None:
    """The formula, the memory, the requests, the line of code."""
    console.print(f"[bold]{name}[/bold] ({plan.model_type}) in {_dtype(plan.dtype)}, {plan.dtype_source}")
    console.print("\n[bold]K and V of one token[/bold]" + _stored(plan))
    for line in _formula(plan):
        console.print(f"  {line}", soft_wrap=True)
    console.print()
    console.print(_memory(plan))
    console.print()
    console.print(_workload(plan), style="italic")
    console.print(_requests(plan))
    console.print()
    console.print(_contexts(plan))
    for note in plan.notes:
        console.print(f"[dim]• {note}[/dim]")
    console.print(f"\n{plan.code}  # or memory={plan.pool_memory}, {format_bytes(plan.pool_memory)}", soft_wrap=True)


def _stored(plan: Plan) -> str:
    return f", stored in {_dtype(plan.kv_dtype)} with scales" if plan.kv_dtype != plan.dtype else ""


def _formula(plan: Plan) -> Iterator[str]:
    for kind in plan.kinds:
        yield kind.formula
        if kind.comparison:
            yield f"  [dim]{kind.comparison}[/dim]"
        if kind.window is not None:
            held = (kind.window + plan.block_size - 2) // plan.block_size + 1
            yield f"  [dim]at most {held * plan.block_size:,} tokens held: blocks behind the window are given back[/dim]"
    if len(plan.kinds) > 1:
        yield f"together {format_bytes(plan.bytes_per_token)}, as long as windows are not full"


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    weights = plan.weights
    count = f"{weights.num_parameters / 1e9:.3g}e9 parameters, " if weights.num_parameters else ""
    share = f"{plan.overhead / plan.memory:.0%} kept for activations and the like (--overhead)"
    table.add_row("all", format_bytes(plan.memory), plan.memory_source)
    table.add_row("weights", format_bytes(weights.nbytes), f"{count}{weights.note}")
    table.add_row("reserve", format_bytes(plan.overhead), share)
    table.add_row("K, V and states", format_bytes(plan.available), _blocks(plan))
    return table


def _blocks(plan: Plan) -> str:
    more = ", and more where windows are full" if any(plan.windows) else ""
    return (
        f"{plan.num_blocks:,} blocks of {plan.block_size} tokens ({format_bytes(plan.block_nbytes)} each): "
        f"{plan.num_tokens:,} tokens{more}"
    )


def _workload(plan: Plan) -> str:
    """Which requests are meant."""
    prompt, output = plan.lengths.mean
    mean = "on average " if len(plan.lengths.requests) > 1 else ""
    title = f"Requests at a time: {mean}{prompt:,.0f} tokens of prompt, {output:,.0f} of output"
    if plan.lengths.shared_prefix_len:
        title += f", {plan.lengths.shared_prefix_len:,} of the prompt the same for all"
    if plan.lengths.num_beams > 1:
        title += f", {plan.lengths.num_beams} rows each"
    source = f"\n{plan.lengths.source}" if plan.lengths.source else ""
    return f"{title}; all at their full length{source}"


def _requests(plan: Plan) -> Table:
    table = Table()
    table.add_column("memory")
    table.add_column("per request", justify="right")
    table.add_column("requests", justify="right")
    for way in (plan.contiguous, plan.padded, plan.paged, *([plan.one_pass] if any(plan.windows) else [])):
        table.add_row(_words(way, plan), format_bytes(way.bytes_per_request), f"{way.num_requests:,}")
    return table


def _words(way: Way, plan: Plan) -> str:
    reserved = f"; {plan.context:,} tokens" if way.name == "contiguous" else ""
    shared = f"; {format_bytes(way.shared_bytes)} once for all" if way.shared_bytes else ""
    chunks = CHUNKS if way.name == "paged" and any(plan.windows) else ""
    return WORDS[way.name] + chunks + reserved + shared


def _contexts(plan: Plan) -> Table:
    chunks = CHUNKS if any(plan.windows) else ""
    table = Table(title=f"Requests of one length, one row each, nothing shared{chunks}", title_justify="left")
    for name in ("tokens", "K and V", "paged", f"contiguous, {plan.context:,} reserved"):
        table.add_column(name, justify="right")
    for line in plan.contexts:
        table.add_row(f"{line.num_tokens:,}", format_bytes(line.kv_bytes), f"{line.paged:,}", f"{line.contiguous:,}")
    return table


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
