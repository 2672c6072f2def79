"""What 8 bits of K and V cost: perplexity, tokens that change, and bytes, against the same model with float32.

    python benchmarks/bench_quantized.py

The model is the one that the package carries, in float32 on a patched model; only the pool differs. The text is the
modules of the running Python's standard library that neither its weights nor its tokenizer saw (training.json lists them).

- *Perplexity* and *agreement on text*: windows of that text, one token per forward, so that every token is predicted from
  K and V that were read back from the pool. Agreement is the share of tokens at which the most likely next token is the
  one that float32 gives; KL is the divergence of the prediction from float32's.
- *Agreement, forced*: the continuations that float32 gives greedily, fed token by token.
- *Free*: greedy `generate`; how many tokens agree before the first that differs, and how many rows never do.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from script import finish, make_results, parse, parser

from paged_cache import BlockPool, PagedCache, patch
from paged_cache.assets import MODEL_PATH
from paged_cache.bench.results import Line
from paged_cache.loading import few_threads, load
from paged_cache.memory.storage import KVStorage

EXACT = "float32"
KV_DTYPES = (EXACT, "bfloat16", "fp8_e4m3", "int8")
COLUMNS = [
    "bytes_per_token", "perplexity", "divergence", "text_agreement_percent", "forced_agreement_percent", "free_tokens", "free_rows",
]  # fmt: skip
QUICK = {"windows": 4, "length": 40, "prompts": 4, "prompt": 16, "new": 8}
Pools = dict[str, BlockPool]


@dataclass
class Sums:
    """Over all predictions of one pool."""

    nats: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0
    predictions: int = 0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, target: torch.Tensor) -> None:
        """One forward: logits `[batch, vocab]` of this pool and of float32, and the tokens that came, `[batch]`."""
        mine, theirs = logits.double().log_softmax(-1), exact.double().log_softmax(-1)
        self.nats -= mine.gather(1, target[:, None]).sum().item()
        self.divergence += (theirs.exp() * (theirs - mine)).sum().item()
        self.agreeing += int((logits.argmax(-1) == exact.argmax(-1)).sum())
        self.predictions += len(target)


def held_out_windows(tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """int64 `[count, length]`: windows of text the model never saw, evenly spread, each behind the first token of a text."""
    names = json.loads((MODEL_PATH / "training.json").read_text(encoding="utf-8"))["corpus"]["held_out"]
    texts = [(Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8") for name in names]
    ids = torch.tensor(tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    windows = ids[starts[:, None] + torch.arange(length)]
    windows[:, 0] = tokenizer.bos_token_id
    return windows


def make_pools(model: Any, num_tokens: int) -> Pools:
    """A pool per dtype, without prefix reuse: every run computes everything."""
    pools: Pools = {}
    for name in KV_DTYPES:
        quantised = name if name not in (EXACT, "bfloat16") else None
        num_blocks = -(-num_tokens // 16)
        pools[name] = BlockPool.for_model(model, num_blocks=num_blocks, kv_dtype=quantised, prefix_caching=False)
    # A float32 model does not ask for 16 bits, but they are what most pools have: the line to compare 8 bits with.
    old = pools["bfloat16"].storage
    size = (old.layout, old.num_blocks, old.block_size, old.dtype, old.device)
    pools["bfloat16"].storage = KVStorage(*size, torch.bfloat16)
    return pools


@torch.no_grad()
def forced(model: Any, pools: Pools, ids: torch.Tensor, start: int) -> dict[str, Sums]:
    """Feeds `ids` `[batch, length]` to all pools: the first `start` tokens at once, then one by one."""
    caches = {name: PagedCache(pool) for name, pool in pools.items()}
    sums = {name: Sums() for name in pools}
    for new, target in _steps(ids, start):
        logits = {name: model(new, past_key_values=cache).logits[:, -1] for name, cache in caches.items()}
        for name, mine in logits.items():
            sums[name].add(mine, logits[EXACT], target)
    for cache in caches.values():
        cache.release()
    return sums


def _steps(ids: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens of each forward `[batch, new]`, and those that follow `[batch]`."""
    yield ids[:, :start], ids[:, start]
    for end in range(start + 1, ids.shape[1]):
        yield ids[:, end - 1 : end], ids[:, end]


def free(model: Any, pool: BlockPool, prompts: torch.Tensor, num_new: int) -> torch.Tensor:
    """Greedy continuations `[batch, num_new]`."""
    length: dict[str, Any] = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
    with PagedCache(pool) as cache:
        output = model.generate(prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, **length)
    return output[:, prompts.shape[1] :]  # type: ignore[no-any-return]


def lines(windows: torch.Tensor, args: argparse.Namespace) -> list[Line]:
    """A line per dtype. Counts, not times: one sample each."""
    model, _ = load(MODEL_PATH)
    prompts = windows[: args.prompts, : args.prompt]
    pools = make_pools(model, max(windows.numel(), args.prompts * (args.prompt + args.new)) + 16 * len(windows))
    with few_threads(model), patch(model):
        on_text = forced(model, pools, windows, start=1)
        answers = {name: free(model, pool, prompts, args.new) for name, pool in pools.items()}
        on_answers = forced(model, pools, torch.cat([prompts, answers[EXACT]], dim=1), start=args.prompt)
    case = {"windows": args.windows, "prompts": args.prompts}
    found = []
    for name, pool in pools.items():
        text, answer = on_text[name], on_answers[name]
        agreeing = (answers[name] == answers[EXACT]).int().cumprod(1).sum(1)
        numbers = (
            pool.bytes_per_token,
            float(torch.tensor(text.nats / text.predictions).exp()),
            text.divergence / text.predictions,
            100 * text.agreeing / text.predictions,
            100 * answer.agreeing / answer.predictions,
            agreeing.float().mean().item(),
            int((agreeing == args.new).sum()),
        )
        found.append(Line(case, name, {metric: [number] for metric, number in zip(COLUMNS, numbers, strict=True)}))
    return found


def main(arguments: list[str] | None = None) -> None:
    """One line per dtype."""
    options = parser(__doc__)
    options.add_argument("--windows", type=int, default=32, help="of held-out text")
    options.add_argument("--length", type=int, default=512, help="tokens of a window")
    options.add_argument(
        "--prompts", type=int, default=32, help="at most as many as windows, whose first tokens they are"
    )
    options.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options.add_argument("--new", type=int, default=256, help="tokens that are generated")
    args = parse(options, arguments, __file__, QUICK)
    title = "What 8 bits of K and V cost, on text that the package's model never saw"
    names = ["windows", "length", "prompts", "prompt", "new"]
    parts: dict[str, Any] = {
        "columns": COLUMNS,
        "compared": ["bytes_per_token", "perplexity"],
        "ours": list(KV_DTYPES[2:]),
    }
    results = make_results(args, "quantized_kv", title, names, **parts)
    results.lines = lines(held_out_windows(load(MODEL_PATH)[1], args.windows, args.length), args)
    finish(results, args)


if __name__ == "__main__":
    main()
