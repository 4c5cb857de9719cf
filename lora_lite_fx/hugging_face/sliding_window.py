"""Keep the work of sliding windows out of graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .causal_lm import caches

# The layers of such caches drop tokens that are out of the window. A graph leaves that to its caller, because the
# number of tokens to drop would be part of the graph.


@contextmanager
def uncut_windows(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let the sliding layers of the caches keep all tokens while a graph is traced."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    class Uncut(DynamicSlidingWindowLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.cumulative_length += key_states.shape[-2]
            return DynamicLayer.update(self, key_states, value_states)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            held = self.keys.shape[-2] if self.keys is not None else 0
            return held + query_length, self.cumulative_length - held

    layers = list(_sliding_layers(arguments))
    for layer in layers:
        layer.__class__ = Uncut
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = DynamicSlidingWindowLayer


def cut_windows(arguments: Mapping[str, Any]) -> None:
    """Drop the tokens that are out of the windows of the sliding layers."""
    for layer in _sliding_layers(arguments):
        layer.keys, layer.values = (t[:, :, -layer.sliding_window + 1 :] for t in (layer.keys, layer.values))


def _sliding_layers(arguments: Mapping[str, Any]) -> Iterator[Any]:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    from ..compat.transformers import keeps_all_tokens

    for cache in caches(arguments).values():
        halves = [getattr(cache, half, None) for half in ("self_attention_cache", "cross_attention_cache")]
        layers = (getattr(part, "layers", ()) for part in (cache, *halves))
        for layer in itertools.chain.from_iterable(layers):
            if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized and not keeps_all_tokens(layer):
                yield layer
