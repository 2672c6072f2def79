"""Plain LoRA of several adapters in one packed forward: the tokens of each adapter are one slice."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from ..compat import plain_lora_classes
from .activation import deactivated
from .tuners import effective, names_in


class Span(NamedTuple):
    """Tokens `start` to `stop` of a forward, which have one adapter; None for those that are active, "__base__" for none."""

    adapter_name: str | None
    start: int
    stop: int


class NotGrouped(Exception):  # noqa: N818 (it says what to do, not what went wrong)
    """A layer did not get the tokens of the forward, side by side and in order."""


class GroupedLora:
    """Adds the adapters of `[1, num_tokens]` to what the base model gives, slice by slice.

    Formula, per slice and adapter (LoRA, Hu et al. 2021): `y += scaling * B(A(x))`.

    Args:
        tuners: All of peft's layers in the model.
    """

    def __init__(self, tuners: list[Any]) -> None:
        linear, embedding = plain_lora_classes()
        self._tuners = tuners
        self._held = {tuner: names_in(tuner) for tuner in tuners}
        self._add = {tuner: _add_linear for tuner in tuners if type(tuner) in linear}
        self._add |= {tuner: _add_embedding for tuner in tuners if type(tuner) in embedding}
        self._covered: dict[str, bool] = {}
        self._spans: dict[int, list[Span]] = {}
        self._active: dict[Any, tuple[str, ...]] = {}

    def covers(self, adapter_name: str | None) -> bool:
        """Whether all that an adapter is (None: all active ones) can be added in this way."""
        if adapter_name is None:
            return all(self._is_plain(tuner, name) for tuner in self._tuners for name in effective(tuner, None))
        if adapter_name not in self._covered:
            holders = (tuner for tuner, held in self._held.items() if adapter_name in held)
            self._covered[adapter_name] = all(self._is_plain(tuner, adapter_name) for tuner in holders)
        return self._covered[adapter_name]

    @contextmanager
    def running(self, *spans: list[Span]) -> Iterator[None]:
        """While this is open, a forward of the model gives each of its tokens its adapter.

        Args:
            *spans: For all tokens, side by side; and for those of them whose logits are asked for.

        Raises:
            NotGrouped: In the forward: a layer cannot tell which token is which. From then on it is not covered.
        """
        asked = {span.adapter_name for span in spans[0]}
        self._active = {tuner: effective(tuner, None) for tuner in self._tuners} if None in asked else {}
        self._spans = {part[-1].stop: part for part in reversed(spans)}
        with deactivated(self._tuners), ExitStack() as stack:
            for tuner, held in self._held.items():
                if not asked.isdisjoint(held) or self._active.get(tuner):
                    stack.callback(tuner.register_forward_hook(self._after).remove)
            yield

    def _is_plain(self, tuner: Any, name: str) -> bool:
        is_split = name in getattr(tuner, "input_fns", {})  # over several devices
        return tuner in self._add and name not in tuner.lora_variant and not is_split

    def _after(self, tuner: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Hook behind one of peft's layers, which gave what its base layer gives."""
        x, add = args[0] if args else None, self._add[tuner]
        if x is None or x.shape[0] != 1 or x.dim() + (add is _add_embedding) != 3 or x.shape[1] not in self._spans:
            del self._add[tuner]
            self._covered.clear()
            raise NotGrouped
        x, output, held = x[0], output[0], self._held[tuner]
        for adapter_name, start, stop in self._spans[x.shape[0]]:
            if adapter_name is None:
                for name in self._active[tuner]:
                    add(tuner, name, x[start:stop], output[start:stop])
            elif adapter_name in held:
                add(tuner, adapter_name, x[start:stop], output[start:stop])


def _add_linear(tuner: Any, name: str, x: torch.Tensor, output: torch.Tensor) -> None:
    """Adds an adapter to `output`, `[tokens, out_features]`, in place."""
    modules = tuner._modules  # quicker than attributes: this is asked for each adapter in each layer of each step
    down, up, scaling = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name], tuner.scaling[name]
    a, b = down._parameters.get("weight"), up._parameters.get("weight")
    is_one_dtype = a is not None and b is not None and a.dtype == b.dtype == x.dtype == output.dtype
    if is_one_dtype and up._parameters.get("bias") is None and not ("_hf_hook" in vars(down) or "_hf_hook" in vars(up)):
        output.addmm_(torch.mm(x, a.t()), b.t(), alpha=scaling)
    else:
        output += up(down(tuner._cast_input_dtype(x, down.weight.dtype))) * scaling


def _add_embedding(tuner: Any, name: str, ids: torch.Tensor, output: torch.Tensor) -> None:
    down, up = tuner.lora_embedding_A[name].T, tuner.lora_embedding_B[name].T
    delta = (tuner._embed(ids, down) @ up) * tuner.scaling[name]
    scale = tuner._get_embed_scale()
    output += delta if scale is None else delta * scale.to(delta.dtype)
