"""How many bits a quantised weight takes, scales included, as a config's `quantization_config` tells."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

Bits = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class Scheme:
    """A way to store weights.

    Attributes:
        name: For readers.
        bits: Per weight, scales included; None where this package does not know them.
        kinds: Which parameters are stored so: those of "linear" layers, of fused "experts".
        skipped: Regular expressions for the names of those that are not.
    """

    name: str
    bits: float | None
    kinds: tuple[str, ...]
    skipped: tuple[str, ...]


def scheme_of(config: PreTrainedConfig) -> Scheme | None:
    """The scheme that a config names; None if its weights are not quantised."""
    raw = getattr(config, "quantization_config", None)
    if not raw:
        return None
    options: Mapping[str, Any] = raw if isinstance(raw, Mapping) else raw.to_dict()
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method", "unknown")))
    bits_of, kinds = _METHODS.get(method, (None, ()))
    bits = bits_of(options) if bits_of is not None else None
    if bits is None:
        return Scheme(f"the bits of quantization method {method!r} are not known here", None, (), ())
    return Scheme(method, bits, kinds, _skipped(options))


def _skipped(options: Mapping[str, Any]) -> tuple[str, ...]:
    names = [
        name
        for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")
        for name in options.get(key) or []
        if isinstance(name, str)
    ]
    return tuple(_pattern(name) for name in names)


def _pattern(name: str) -> str:
    if name.startswith("re:"):
        return name.removeprefix("re:")
    return rf"(^|\.){re.escape(name)}(\.|$)"


def _bitsandbytes(options: Mapping[str, Any]) -> float | None:
    if options.get("load_in_8bit") or options.get("_load_in_8bit"):
        return 8
    if options.get("load_in_4bit") or options.get(
        "_load_in_4bit"
    ):  # a scale per 64 weights; doubly: 8 bits, one per 256
        return 4 + (8 / 64 + 32 / (64 * 256) if options.get("bnb_4bit_use_double_quant") else 32 / 64)
    return None


def _grouped(options: Mapping[str, Any]) -> float | None:
    """A scale of 16 bits and a zero for each group."""
    bits, group_size = options.get("bits"), options.get("group_size", -1)
    if not isinstance(bits, int):
        return None
    return bits + ((16 + bits) / group_size if isinstance(group_size, int) and group_size > 0 else 0)


def _fp8(options: Mapping[str, Any]) -> float:
    """A scale of 32 bits for each tile, or for a whole matrix."""
    rows, columns = options.get("weight_block_size") or (0, 0)
    return 8 + (32 / (rows * columns) if rows and columns else 0)


def _compressed_tensors(options: Mapping[str, Any]) -> float | None:
    groups = [group.get("weights") or {} for group in (options.get("config_groups") or {}).values()]
    bits = {group.get("num_bits") for group in groups}
    if len(bits) != 1 or not isinstance(next(iter(bits)), int):
        return None
    return _grouped({"bits": bits.pop(), "group_size": groups[0].get("group_size") or -1})


def _mxfp4(options: Mapping[str, Any]) -> float:
    """A scale of 8 bits for 32 weights."""
    return 4 + 8 / 32


_LINEAR, _ALL, _EXPERTS = ("linear",), ("linear", "experts"), ("experts",)
_METHODS: dict[str, tuple[Bits, tuple[str, ...]]] = {
    "bitsandbytes": (_bitsandbytes, _LINEAR),
    "gptq": (_grouped, _ALL),
    "awq": (_grouped, _ALL),
    "fp8": (_fp8, _ALL),
    "compressed-tensors": (_compressed_tensors, _ALL),
    "mxfp4": (_mxfp4, _EXPERTS),
}
