"""`paged-cache demo` on the screen: runs the steps of `demo.py` and shows what each found."""

import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .assets import MODEL_PATH
from .demo import PROMPTS, Beams, Call, Demo, Row
from .kv_memory import Memory
from .loading import few_threads, load
from .observability.pool_page import save_html
from .optional import not_installed
from .picture import as_text, row_color, save_png
from .pool_map import PoolMap, pool_map
from .wording import format_bytes

BAR = 24
WIDTH = 100


def run(model_name: str | Path, prompts: list[str], max_new_tokens: int, output: Path, console: Console) -> bool:
    """Runs and shows all steps.

    Args:
        model_name: Id on the hub, or a folder.
        prompts: Of the batch; ours if there are none.
        max_new_tokens: Per prompt.
        output: Folder for picture and page, made if it is not there.
        console: Where to write.

    Returns:
        Whether every result is the same as with transformers' own caches.

    Raises:
        PagedCacheError: The model, or something asked of it, cannot be had; the message is one line.
    """
    start = time.perf_counter()
    console.width = min(console.width, WIDTH)
    with console.status(f"Loading {model_name}"):
        model, tokenizer = load(model_name)
        demo = Demo(model, tokenizer, prompts or list(PROMPTS), max_new_tokens)
    _show_model(console, model_name, demo)
    is_code = not prompts or Path(model_name) == MODEL_PATH
    with few_threads(model):
        is_identical = _run_steps(console, demo, is_code)
    _show_pool(console, pool_map(demo.pool, demo.caches), output / "pool.png")
    console.print(f"[dim]{time.perf_counter() - start:.1f} s[/]")
    return is_identical


def _run_steps(console: Console, demo: Demo, is_code: bool) -> bool:
    with console.status("Compiling the attention kernel, which takes a while the first time"):
        demo.warm_up()
    with console.status("Generating, with a PagedCache and without it"):
        rows = demo.batch()
    _show_rows(console, rows, demo.tokenizer, is_code)
    _show_comparison(console, rows)
    with console.status("The same batch with transformers' caches"):
        memories = demo.memory(rows)
    _show_memory(console, memories, demo)
    with console.status("Two prompts that start alike"):
        calls = demo.reuse()
    _show_calls(console, calls)
    with console.status("Beam search"):
        beams = demo.beams()
    _show_beams(console, beams)
    return all(row.is_identical for row in rows) and all(call.is_identical for call in calls) and beams.is_identical


def _step(console: Console, title: str, text: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/]", align="left", style="dim")
    console.print(Text(text, style="dim"))
    console.print()


def _show_model(console: Console, name: str | Path, demo: Demo) -> None:
    model, pool = demo.model, demo.pool
    console.print(
        f"[bold]{Path(name).name}[/]: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    )
    console.print(
        f"[bold]Pool[/]: {pool.num_blocks} blocks of {pool.block_size} tokens, {format_bytes(pool.nbytes, 1)}, "
        f"{pool.bytes_per_token:,} bytes per token"
    )


def _show_rows(console: Console, rows: list[Row], tokenizer: Any, is_code: bool) -> None:
    _step(
        console,
        f"1  A batch of {len(rows)} prompts",
        "model.generate(**inputs, past_key_values=PagedCache(pool)); prompts are dim",
    )
    for i, row in enumerate(rows):
        title = f"[bold {row_color(i)}]{chr(ord('A') + i % 26)}[/]  {len(row.prompt)} + {len(row.generated)} tokens"
        prompt = tokenizer.decode(row.prompt, skip_special_tokens=True)
        text = tokenizer.decode([*row.prompt, *row.generated], skip_special_tokens=True)
        if not console.color_system:  # colours cannot show where the model goes on
            text = f"{prompt}»{text[len(prompt) :]}"
        shown = Syntax("", "python", theme="ansi_dark").highlight(text) if is_code else Text(text)
        shown.stylize("dim", 0, len(prompt))
        shown.rstrip()
        console.print(Panel(shown, title=title, title_align="left", border_style="dim", box=box.ROUNDED))


def _show_comparison(console: Console, rows: list[Row]) -> None:
    _step(
        console,
        "2  The same tokens",
        "Each row against model.generate with a DynamicCache, alone and without padding",
    )
    for i, row in enumerate(rows):
        letter = f"  [bold {row_color(i)}]{chr(ord('A') + i % 26)}[/]"
        if row.is_identical:
            console.print(f"{letter}  {len(row.generated)} tokens  [green]identical[/]")
            continue
        at = row.first_difference
        console.print(
            f"{letter}  [bold red]different[/] from new token {at} on: {row.generated[at : at + 8]}, "
            f"DynamicCache gives {row.expected[at : at + 8]}"
        )


def _show_memory(console: Console, memories: list[Memory], demo: Demo) -> None:
    _step(
        console, "3  Memory for keys and values", "Of this batch, counted in the caches themselves after they were used"
    )
    table = _table("", "reserved", "used", "wasted", "", "")
    most = max(memory.reserved for memory in memories)
    for memory in memories:
        sizes = [format_bytes(nbytes, 1) for nbytes in (memory.reserved, memory.used, memory.wasted)]
        bar = _bar(memory.used, memory.wasted, most, BAR if console.width >= WIDTH else BAR // 3)
        table.add_row(memory.name, *sizes, f"{memory.wasted_share:6.1%}", bar)
    console.print(table)
    console.print()
    console.print(
        Padding(
            f"[dim]A StaticCache is sized before the prompts are known, here to a power of two. The pool has "
            f"{demo.pool.num_blocks} blocks; those that this batch does not hold serve others.[/]",
            (0, 2),
        )
    )


def _show_calls(console: Console, calls: list[Call]) -> None:
    _step(
        console,
        "4  A second prompt that starts like the first",
        "Tokens are counted as they enter the model; results are compared with those of a DynamicCache",
    )
    table = _table("", "prompt", "computed", "reused", "decoded", "time", "")
    for call in calls:
        numbers = [call.num_prompt, call.num_computed, call.num_prompt - call.num_computed, call.num_decoded]
        table.add_row(call.name, *map(str, numbers), f"{call.seconds * 1e3:.0f} ms", _verdict(call.is_identical))
    console.print(table)


def _show_beams(console: Console, beams: Beams) -> None:
    _step(
        console,
        f"5  {beams.num_beams} beams over a prompt of {beams.num_prompt} tokens",
        f"model.generate(..., num_beams={beams.num_beams}); the result is compared with that of a DynamicCache",
    )
    table = _table("", "blocks", "memory", "")
    table.add_row("PagedCache", str(beams.num_blocks), format_bytes(beams.nbytes, 1), _verdict(beams.is_identical))
    table.add_row(f"{beams.num_beams} separate copies", str(beams.num_separate), "", "")
    table.add_row("DynamicCache", "", format_bytes(beams.dynamic_nbytes, 1), "")
    console.print(table)


def _show_pool(console: Console, picture: PoolMap, path: Path) -> None:
    _step(
        console, "6  The pool", "One cell per block: its row's letter, small when partly filled; a number when shared"
    )
    console.print(as_text(picture, console.width))
    page = path.with_suffix(".html")
    save_html(picture, page)
    try:
        save_png(picture, path)
    except ModuleNotFoundError:
        console.print(f"\nThe same as a page: {page}")
        console.print(f"No PNG: {not_installed('matplotlib')}", style="yellow", markup=False, soft_wrap=True)
    else:
        console.print(f"\nThe same as a page and as a picture: {page}, {path}")


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim")
    for header in headers:
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    return table


def _bar(used: int, wasted: int, most: int, width: int) -> Text:
    total = max(round(width * (used + wasted) / most), 1)
    filled = round(total * used / max(used + wasted, 1))
    return Text.assemble(("█" * filled, "green"), ("░" * (total - filled), "red"))


def _verdict(is_identical: bool) -> str:
    return "[green]identical[/]" if is_identical else "[bold red]different[/]"
