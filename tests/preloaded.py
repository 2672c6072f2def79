"""Runs scripts in processes that need not import torch and transformers, which takes seconds: they are forked from one that has.

That one is clean: it has imported libraries and `paged_cache`, and run nothing. Where there is no fork, each script has an
interpreter of its own.
"""

import functools
import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

PRELOADED = [
    "paged_cache",
    "paged_cache.batching",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
]


@functools.cache
def _context() -> BaseContext:
    """One server per process of pytest."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_script(path: Path, folder: Path, *arguments: str, timeout: float, **environment: str) -> tuple[int | None, str]:
    """`python PATH ARGUMENTS` in `folder`: the exit status, None where it did not end in time, and all that it printed."""
    output = folder / "output.txt"
    child = _context().Process(target=_child, args=([str(path), *arguments], folder, environment, output))
    child.start()
    child.join(timeout)
    status = child.exitcode
    if status is None:
        child.kill()
        child.join(10)
    return status, output.read_text(encoding="utf-8")


def _child(argv: list[str], folder: Path, environment: dict[str, str], output: Path) -> None:
    """In the new process: what a shell would set up."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")
