"""The Triton kernels that write and copy blocks, without a GPU: their machine code, and what memory they touch."""

import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from paged_cache.kernels.triton import cache
from tests.kernels import aot, interpreter
from tests.kernels.write_cases import pool

pytestmark = pytest.mark.slow

GUARD = Path(__file__).with_name("guard_writes.py")
RIGHT = ["triton,front", "triton,back", "cpu,front", "cpu,back"]
WRONG = ["triton,back,wrong-slot", "cpu,back,wrong-slot", "triton,front,wrong-block", "triton,back,wrong-block"]
compiles = pytest.mark.skipif(
    cache.INTERPRETED or not aot.have_tools(), reason="needs the compiler, and what reads its binaries"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A compilation cache of this module's own."""
    path = tmp_path_factory.mktemp("triton")
    with mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(path)):
        yield path


def write(kv_dtype: torch.dtype, dim: int = 128, num_tokens: int = 37) -> None:
    """The call of a Llama's layer."""
    new = torch.zeros(1, num_tokens, 8, dim, dtype=torch.bfloat16)[0]
    pool(kv_dtype, "HND", 16, (8, 8), (dim, dim)).write(cache.write_kv, new, new.clone(), torch.arange(num_tokens))


def copy(num_pairs: int = 2, dtype: torch.dtype = torch.bfloat16) -> None:
    """The copy of blocks of four layers."""
    slabs = [torch.zeros(6, 16 * 8 * 128, dtype=dtype) for _ in range(8)]
    cache.copy_blocks(slabs, slabs, torch.zeros(num_pairs, 2, dtype=torch.int64))


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_writes_compile_to_good_code(kv_dtype: torch.dtype, capability: int, folder: Path) -> None:
    """One kernel for K and V, nothing spilled, 16 bytes at a time, on GPUs that know no e4m3 as well."""
    (machine,) = aot.machine_code(lambda: write(kv_dtype), capability, folder)
    assert machine.stack == machine.local == 0
    assert machine.count(r"LDG\b.*\.128") == machine.count(r"LDG\b.*") - 2 > 0  # but the slots
    assert machine.count(r"STG\b.*\.128") == machine.count(r"STG\b.*") - (0 if kv_dtype is torch.bfloat16 else 2) > 0


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_copies_compile_to_good_code(capability: int, folder: Path) -> None:
    """Addresses that are read from memory are known to be aligned: 16 bytes at a time."""
    (machine,) = aot.machine_code(copy, capability, folder)
    assert machine.stack == machine.local == 0
    assert machine.count(r"LDG\b.*\.128") == machine.count(r"LDG\b.*") - 4 > 0  # but addresses and pairs
    assert machine.count(r"STG\b.*\.128") == machine.count(r"STG\b.*") > 0


@compiles
def test_numbers_of_tokens_and_pairs_do_not_recompile(folder: Path) -> None:
    """Whatever a forward brings, the kernels are the same."""
    with aot.compile_only(90) as kernels:
        for num in (1, 2, 16, 17, 4096):
            write(torch.int8, num_tokens=num if num < 100 else 96)
            copy(num)
    assert len({kernel.hash for kernel in kernels}) == 2


@pytest.fixture(scope="module")
def outcomes() -> dict[str, interpreter.Outcome]:
    """The writers under the interpreter, with unmapped memory around every tensor."""
    return interpreter.outcomes(GUARD, RIGHT + WRONG)


@pytest.mark.parametrize("job", RIGHT)
def test_touches_nothing_outside_its_tensors(job: str, outcomes: dict[str, interpreter.Outcome]) -> None:
    """With unmapped memory right before (behind) every tensor, all writes and copies run to the end."""
    assert outcomes[job].status == 0, outcomes[job]
    assert outcomes[job].stdout.count("right") >= 6


@pytest.mark.parametrize("job", WRONG)
def test_the_guard_pages_catch_a_mistake(job: str, outcomes: dict[str, interpreter.Outcome]) -> None:
    """The test above can fail: one slot or block just outside the pool, and the process dies of it."""
    assert outcomes[job].status == -signal.SIGSEGV, outcomes[job]


def test_addresses_are_sent_without_waiting() -> None:
    """From pinned memory, once for each stream: another stream would not wait for them."""
    cache._addresses.cache_clear()
    with mock.patch.object(torch, "tensor") as tensor:
        sent = [cache._addresses((3, 4), torch.device("cuda", 0), stream) for stream in ("one", "two", "one")]
    assert [call.kwargs["pin_memory"] for call in tensor.call_args_list] == [True, True]
    tensor.return_value.to.assert_called_with(torch.device("cuda", 0), non_blocking=True)
    assert sent[0] is sent[2]
    cache._addresses.cache_clear()
