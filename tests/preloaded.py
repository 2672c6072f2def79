"""Runs scripts in processes that need not import torch and transformers, which takes seconds: they are forked from one that has.

That one is clean: it has imported libraries and `paged_cache`, and run nothing. Where there is no fork, each script has an
interpreter of its own. What such a script cannot show: that it imports all that it names, and what happens when an interpreter ends
(no `atexit`). Variables that libraries read when they are imported are those of `conftest.py`.
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


def run_script(
    path: Path, folder: Path, *arguments: str, timeout: float, **environment: str
) -> tuple[int | None, str, str]:
    """`python PATH ARGUMENTS` in `folder`: the exit status, None where it did not end in time, output and errors."""
    streams = folder / "stdout.txt", folder / "stderr.txt"
    child = _context().Process(target=_child, args=([str(path), *arguments], folder, environment, *streams))
    child.start()
    child.join(timeout)
    status = child.exitcode
    if status is None:
        child.kill()
        child.join(10)
    stdout, stderr = (stream.read_text(encoding="utf-8") for stream in streams)
    return status, stdout, stderr


def _child(argv: list[str], folder: Path, environment: dict[str, str], *streams: Path) -> None:
    """In the new process: what a shell would set up."""
    for descriptor, stream in enumerate(streams, 1):
        with stream.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")
