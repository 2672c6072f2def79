"""Decode attention on CPU: paged blocks in place, against SDPA on dense K/V and against DynamicCache's concatenation.

    python benchmarks/bench_cpu_decode.py --dtypes float32 bfloat16 --batches 1 8 32 --contexts 128 512 2048 8192

All candidates of a line run in turns, so that a disturbance hits all of them; each result is checked before its time is
shown. Times are the median (and the fastest) in microseconds. `GB/s` is K and V once, over the fastest time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from paged_cache.kernels import cpu

Candidate = Callable[[], torch.Tensor]
BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # outputs are averages, at most about 1


def paged_pool(dense: torch.Tensor, table: torch.Tensor, layout: str) -> torch.Tensor:
    """Dense `[batch, kv_heads, context, dim]` as blocks `[num_blocks, block_size, kv_heads, dim]`, laid out as asked."""
    batch, heads, context, dim = dense.shape
    blocks = dense.transpose(1, 2).reshape(batch * context // BLOCK_SIZE, BLOCK_SIZE, heads, dim)
    pool = torch.empty_like(
        blocks if layout == "NHD" else blocks.transpose(1, 2), memory_format=torch.contiguous_format
    )
    pool = pool if layout == "NHD" else pool.transpose(1, 2)
    pool[table.flatten().long()] = blocks
    return pool


def candidates(args: argparse.Namespace, batch: int, context: int, dtype: torch.dtype) -> dict[str, Candidate]:
    """What is compared, by name, as far as the memory allows."""
    heads, group = args.kv_heads, args.heads // args.kv_heads
    keys, values = (torch.randn(batch, heads, context, args.dim).to(dtype) for _ in range(2))
    query = torch.randn(batch, 1, args.heads, args.dim).to(dtype).transpose(1, 2)
    grouped = query.reshape(batch, heads, group, args.dim)  # faster than enable_gqa, which bfloat16 pays for 4 times
    table = torch.randperm(batch * context // BLOCK_SIZE).int().view(batch, -1)
    lens = torch.full((batch,), context, dtype=torch.int32)
    slots, last = table[:, -1].long(), BLOCK_SIZE - 1
    old_keys, old_values = keys[:, :, :-1], values[:, :, :-1]
    new_key, new_value = keys[:, :, -1:], values[:, :, -1:]

    def sdpa(keys: torch.Tensor = keys, values: torch.Tensor = values) -> torch.Tensor:
        return F.scaled_dot_product_attention(grouped, keys, values).reshape(batch, 1, args.heads, args.dim)

    def concatenation() -> torch.Tensor:
        return sdpa(torch.cat([old_keys, new_key], dim=2), torch.cat([old_values, new_value], dim=2))

    def paged(layout: str) -> tuple[Candidate, Candidate]:
        key_cache, value_cache = paged_pool(keys, table, layout), paged_pool(values, table, layout)

        def attend() -> torch.Tensor:
            return cpu.paged_attention(query, key_cache, value_cache, table, lens, scale=args.dim**-0.5)

        def write_and_attend() -> torch.Tensor:
            key_cache[slots, last] = new_key[:, :, 0]
            value_cache[slots, last] = new_value[:, :, 0]
            return attend()

        return attend, write_and_attend

    result: dict[str, Candidate] = {"sdpa": sdpa}
    result["NHD"], result["NHD+write"] = paged("NHD")
    size = 2 * keys.nbytes
    if 3 * size <= args.memory * 2**30:
        result["HND"], result["HND+write"] = paged("HND")
    if 4 * size <= args.memory * 2**30:
        result["cat+sdpa"] = concatenation
    return result


def measure(runs: dict[str, Candidate], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every candidate, in turns for about so many seconds, at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["sdpa"]) < 5:
        for name, run in runs.items():
            run()  # each then finds in the cache what it left there itself, not what the one before it read
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def check(runs: dict[str, Candidate], dtype: torch.dtype) -> None:
    """Every candidate gives what SDPA gives."""
    expected = runs["sdpa"]().float()
    for name, run in runs.items():
        worst = (run().float() - expected).abs().max().item()
        if not worst < TOLERANCE[dtype]:
            raise SystemExit(f"{name} is off by {worst}: no times for wrong results")


def main() -> None:
    """Measures the table that the options describe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 2048, 8192], help="multiples of 16")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="per line")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of K and V, all candidates together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    big = torch.ones(2**26)  # 256 MiB
    read = min(measure({"sdpa": big.sum}, 2.0)["sdpa"])
    print(f"{args.threads} threads, plain read of 256 MiB: {big.nbytes / read / 1e9:.1f} GB/s")
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for batch, context in ((batch, context) for batch in args.batches for context in args.contexts):
            runs = candidates(args, batch, context, dtype)
            check(runs, dtype)
            size = 2 * batch * args.kv_heads * context * args.dim * dtype.itemsize
            print(f"{str(dtype)[6:]} {batch}x{context} {size / 2**20:.1f} MiB", end="", flush=True)
            for name, times in measure(runs, args.seconds).items():
                spread = statistics.quantiles(times, n=4)
                fastest, median = min(times) * 1e6, spread[1] * 1e6
                print(f" | {name} {median:.0f} ({fastest:.0f}, iqr {(spread[2] - spread[0]) * 1e6:.0f})", end="")
                print(f" {size / fastest / 1e3:.1f} GB/s", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
