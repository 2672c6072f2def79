"""Who computes the attention of a problem: this package, and what one would use without it."""

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer

from ...kernels import dispatch, paged_attention
from .problem import Problem
from .shapes import Group

Output = torch.Tensor | list[torch.Tensor]
Candidate = Callable[[int], Output]
"""Computes the attention of the i-th layer of a forward, in one of the forms that `Problem.error` takes.

A problem with fewer layers uses them in turn.
"""

PAGED, WRITE, READ = "paged", "write+paged", "read"
FAR_BYTES = 2**29  # far beyond the caches
OPPONENT = {"sdpa": PAGED, "varlen": PAGED, "gather+sdpa": PAGED, "dynamic": WRITE}
"""Each peer, and the one of ours that does the same work."""

Setting = tuple[str, int]
"""Another value for a constant of the package, `("kernels.cpu.attention.SERIAL_BYTES", 0)`, or for a field of Triton's `Config`."""


def variant(setting: Setting) -> str:
    """A candidate's name: ours with another value of a constant."""
    return f"{PAGED} {setting[0].rpartition('.')[2]}={setting[1]}"


def plain_read(problem: Problem) -> Candidate:
    """No attention: a sum over `FAR_BYTES`. In turns with the others it shows what the memory gives at that time."""
    x = torch.ones(FAR_BYTES // 4, device=problem.device)
    return lambda layer: x.sum()


def refusal(problem: Problem) -> str | None:
    """Why the fast kernel would leave the problem to the reference, which nobody needs to time, or None."""
    name = os.environ.get(dispatch.VARIABLE) or dispatch.DEFAULTS[problem.device.type]
    if name == "reference":
        return None  # somebody does
    blocks, options = problem.blocks(0), problem.options | problem.scales(0)
    try:
        kernel = importlib.import_module(f"paged_cache.kernels.{name}")
    except ImportError as error:
        return str(error)
    reason: str | None = kernel.supports(problem.query, blocks.keys, blocks.values, **options)
    return reason


def candidates(problem: Problem, settings: list[Setting]) -> dict[str, Callable[[], Candidate]]:
    """Ours and the peers that know the problem, by name. They are made one by one, as any of them may fail."""
    shape, is_cpu = problem.shape, problem.device.type == "cpu"
    result: dict[str, Callable[[], Candidate]] = {PAGED: lambda: paged(problem)}
    for setting in settings:
        result[variant(setting)] = partial(changed, problem, setting)
    result["sdpa"] = lambda: sdpa(problem)
    if shape.section == "decode" and is_cpu:
        result |= {WRITE: lambda: write_and_attend(problem), "dynamic": lambda: dynamic(problem)}
    if shape.section in ("prefill", "chunk", "mixed"):
        result["gather+sdpa"] = lambda: gather_and_sdpa(problem)
    if not is_cpu and not shape.first:
        result["varlen"] = lambda: varlen(problem)
    return result


def paged(problem: Problem) -> Candidate:
    """Attention over blocks; the layers share a memo, and the first one pays for what is in it, as in a real forward."""
    memo: dict[Any, Any] = {}
    calls = [
        ((problem.query, x.keys, x.values, problem.block_table, problem.seq_lens), problem.options | problem.scales(i))
        for i, x in problem.storage.layers.items()
    ]

    def attend(layer: int) -> torch.Tensor:
        nonlocal memo
        if layer == 0:
            memo = {}
        tensors, options = calls[layer % len(calls)]
        return paged_attention(*tensors, **options, memo=memo)

    return attend


def write_and_attend(problem: Problem) -> Candidate:
    """The newest token of each row is written, then read with the others; it is the one that was there before."""
    slots = problem.slots(*_only(problem)).view(-1, problem.shape.context)[:, -1].contiguous()
    new, attend = [problem.storage.gather(layer, slots) for layer in range(problem.num_layers)], paged(problem)

    def run(layer: int) -> Output:
        place = layer % problem.num_layers
        problem.storage.write(place, slots, *new[place])
        return attend(layer)

    return run


def sdpa(problem: Problem) -> Candidate:
    """On K and V that lie dense, as after a prefill or in a static cache; rows of one length together."""
    calls = [
        _attention(problem.group_query(group, start), group, problem)
        for group, start in zip(problem.shape.groups, problem.group_starts, strict=True)
    ]

    def run(layer: int) -> list[torch.Tensor]:
        return [call(*pair) for call, pair in zip(calls, problem.dense[layer % problem.num_layers], strict=True)]

    return run


def gather_and_sdpa(problem: Problem) -> Candidate:
    """What blocks cost without a kernel for them."""
    groups = list(zip(problem.shape.groups, problem.group_starts, strict=True))
    calls = [
        (group, problem.slots(group, start), _attention(problem.group_query(group, start), group, problem))
        for group, start in groups
    ]

    def run(layer: int) -> list[torch.Tensor]:
        return [call(*problem.gather(layer % problem.num_layers, slots, group)) for group, slots, call in calls]

    return run


def dynamic(problem: Problem) -> Candidate:
    """transformers' own layer: `torch.cat` with the newest token, then SDPA. Each call begins with the same context."""
    group, start = _only(problem)
    attention = _attention(problem.group_query(group, start), group, problem)
    pairs = [pair for (pair,) in problem.dense]
    old = [[x[:, :, :-1].contiguous() for x in pair] for pair in pairs]
    new = [[x[:, :, -1:].contiguous() for x in pair] for pair in pairs]
    cache: Any = DynamicLayer()
    cache.lazy_initialization(*new[0])

    def run(layer: int) -> list[torch.Tensor]:
        place = layer % problem.num_layers
        cache.keys, cache.values = old[place]
        return [attention(*cache.update(*new[place]))]

    return run


def varlen(problem: Problem) -> Candidate:
    """torch's attention for rows of different lengths, on dense K and V; its arguments differ between versions."""
    varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn  # not built everywhere
    group, _ = _only(problem)
    known = inspect.signature(varlen_attn).parameters
    window = problem.shape.window
    options: dict[str, Any] = {"scale": problem.options["scale"]} if "scale" in known else {}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    query = problem.query.transpose(1, 2).flatten(0, 1)
    rows = torch.arange(group.rows + 1, dtype=torch.int32, device=problem.device)
    starts = rows * group.q_len, rows * group.context
    pairs = [[x.transpose(1, 2).flatten(0, 1) for x in pair] for (pair,) in problem.dense]

    def run(layer: int) -> list[torch.Tensor]:
        out = varlen_attn(query, *pairs[layer % len(pairs)], *starts, group.q_len, group.context, **options)
        return [out.unflatten(0, (group.rows, group.q_len))]

    return run


def changed(problem: Problem, setting: Setting) -> Candidate:
    """Ours with another value of a constant."""
    attend, (module, name, value) = paged(problem), _place(setting)

    def run(layer: int) -> Output:
        with mock.patch.object(module, name, value):
            return attend(layer)

    return run


def _place(setting: Setting) -> tuple[ModuleType, str, Any]:
    """A module, a name in it and the object that has to stand there."""
    path, value = setting
    module, _, name = path.rpartition(".")
    if module:
        return importlib.import_module(f"paged_cache.{module}"), name, value
    config = importlib.import_module("paged_cache.kernels.triton.config")
    choose = config.choose
    return config, "choose", lambda *args: dataclasses.replace(choose(*args), **{name: value})


def _only(problem: Problem) -> tuple[Group, int]:
    (group,) = problem.shape.groups
    return group, 0


def _attention(
    query: torch.Tensor, group: Group, problem: Problem
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """SDPA in the form that is fastest on the device: K and V `[rows, kv_heads, context, dim]` to `[rows, q_len, …]`."""
    shape, is_cpu = problem.shape, problem.device.type == "cpu"
    if group.q_len == 1:
        window = slice(None) if shape.window is None else slice(-shape.window, None)
        if is_cpu:  # grouped queries are faster here than enable_gqa
            query = query.reshape(group.rows, shape.kv_heads, -1, shape.dim)

        def decode(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            out = F.scaled_dot_product_attention(query, keys[:, :, window], values[:, :, window], enable_gqa=not is_cpu)
            return out.reshape(group.rows, 1, shape.heads, shape.dim)

        return decode
    assert shape.window is None, "no peer for windows over several new tokens"
    mask: Any = None
    if group.q_len < group.context:
        size = group.q_len, group.context
        mask = torch.ones(size, dtype=torch.bool).tril(size[1] - size[0]) if is_cpu else causal_lower_right(*size)
    options: dict[str, Any] = {"is_causal": True} if mask is None else {"attn_mask": mask}

    def prefill(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True, **options).transpose(1, 2)

    return prefill
