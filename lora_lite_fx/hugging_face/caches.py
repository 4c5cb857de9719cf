"""The caches of calls: the layers that a causal language model gives its cache, how these are opened, and windows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.forward_signature import forward_signature
from ..errors import AdapterError
from ..graph.modes import in_mode
from ..graph.tensors import has_values

# Every dynamic dimension of an example has a size of its own, and none is one: torch.export specializes ones.
BATCH, LENGTH, PAST = 3, 7, 5


def caches(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caches among the arguments of a call, which the call changes."""
    from transformers.cache_utils import Cache

    return {name: value for name, value in arguments.items() if isinstance(value, Cache)}


def refuse_exports_with_static_cache(arguments: Mapping[str, Any]) -> None:
    """Raise `AdapterError` if `torch.export` traces a call with a cache of a fixed length among its arguments."""
    if not torch.compiler.is_exporting():
        return
    from transformers.cache_utils import StaticCache

    if any(isinstance(value, StaticCache) for value in arguments.values()):
        raise AdapterError(
            "torch.export does not take an adapted model with a static cache, because its graphs keep caches outside"
            " of themselves. The way out: llfx.export(model, cache=True); or export llfx.merge(model), which is a plain"
            " model of transformers."
        )


# The layers of a model's cache.


class EmptyLayer(NamedTuple):
    """A layer of a cache that has seen no token.

    Args:
        keys, values: `(1, heads, 0, d)`.
        sliding_window: how many tokens it keeps; None for all.
    """

    keys: Tensor
    values: Tensor
    sliding_window: int | None

    def made(self) -> Any:
        """Return a layer of this kind, which is not initialized."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        if self.sliding_window is None:
            return DynamicLayer()
        return DynamicSlidingWindowLayer(sliding_window=self.sliding_window)


class Decoder(NamedTuple):
    """The facts that a run of a causal language model has shown.

    Args:
        layers: those of its cache, which may be more than its config says: Dory adds some for layers that run twice.
        keeps_some_logits: whether it takes `logits_to_keep`.
    """

    layers: tuple[EmptyLayer, ...]
    keeps_some_logits: bool


@torch.no_grad()
def probe(model: Any) -> Decoder | None:
    """Run a causal language model on a few tokens, left-padded, and on one more, and return what that shows.

    Returns:
        None if it is not one that appends tokens, and these alone, to its cache: GIT widens masks by the tokens of an
        image. None too if tokens see those behind them in texts without padding alone: `is_causal = False` on a module
        of attention says so. Sdpa leaves out a mask of ones there, which a graph of a call with a mask does not.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    from ..compat.transformers import CACHE

    signature = forward_signature(type(model)).parameters
    takes_cache = {"input_ids", "attention_mask", CACHE, "use_cache"} <= signature.keys()
    # Encoders and classifiers take a cache too, but theirs is another result than logits for each token.
    if not takes_cache or not model.can_generate() or model.config.is_encoder_decoder:
        return None
    text = model.config.get_text_config(decoder=True)
    ids, mask = some_text(LENGTH, text, model.device)
    ids[2] = ids[1]
    ids[2, -1] = (ids[1, -1] + 1) % text.vocab_size  # for `_sees_behind`

    def run(**more: Any) -> Any:
        given = {"input_ids": ids, "attention_mask": mask, CACHE: DynamicCache(config=text), "use_cache": True, **more}
        try:
            return model(**given)
        except Exception:  # Kyutai's speech models take tokens in another form, with a column for each code
            return None

    with in_mode(model, False):
        result = run()
        if not isinstance(getattr(result, CACHE, None), DynamicCache):
            return None  # BertLMHeadModel that is not a decoder
        unpadded = run(attention_mask=None)
        longer = torch.cat([mask, mask[:, -1:]], dim=1)
        if run(input_ids=ids[:, :1], attention_mask=longer, **{CACHE: copy.deepcopy(result[CACHE])}) is None:
            return None
    can_tell = unpadded is not None and has_values(unpadded.logits)
    if can_tell and _sees_behind(unpadded.logits) != _sees_behind(result.logits):
        return None
    layers = result[CACHE].layers
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not layers or not all(type(layer) in known and layer.is_initialized for layer in layers):
        return None
    empty = (
        EmptyLayer(layer.keys[:1, :, :0], layer.values[:1, :, :0], getattr(layer, "sliding_window", None))
        for layer in layers
    )
    return Decoder(tuple(empty), "logits_to_keep" in signature)


def _sees_behind(logits: Tensor) -> bool:
    """Return whether tokens before the last see it: it is what distinguishes the second text from the third."""
    one, other = logits[1, :-1], logits[2, :-1]
    return not torch.allclose(one, other, rtol=0, atol=0.01 * float(one.nan_to_num().abs().max()), equal_nan=True)


def some_text(length: int, config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens, and a mask with padding on the left. A token for padding is in the text too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < config.vocab_size:
        ids[0, :2] = ids[1, 3] = padding
    return ids.to(device), mask.to(device)


def opened(cache: Any, config: Any, layers: Sequence[EmptyLayer], batch: int, device: torch.device) -> Any:
    """Return the cache, or a copy whose layers that have seen no token are initialized by an update with none.

    Without a cache, it is a new one for the decoder of a model with that config. Caches that were made with and without
    a config are alike then.
    """
    from transformers.cache_utils import DynamicCache

    if cache is None:
        cache = DynamicCache(config=config.get_text_config(decoder=True))
    elif len(cache.layers) == len(layers) and all(layer.is_initialized for layer in cache.layers):
        if cache.layer_class_to_replicate is None:
            return cache
        layers = ()
    copied = _with_own_layers(cache)
    for index, layer in enumerate(layers):
        if index == len(copied) and copied.layer_class_to_replicate is None:
            copied.layers.append(layer.made())
        if index >= len(copied) or not copied.layers[index].is_initialized:
            none = (t.new_empty((batch, *t.shape[1:]), device=device) for t in (layer.keys, layer.values))
            copied.update(*none, index)
    copied.layer_class_to_replicate = None  # of further layers, which there are none: it tells equal caches apart
    return copied


def _with_own_layers(cache: Any) -> Any:
    """Return a cache with layers of its own that hold the same tensors."""
    copied = object.__new__(type(cache))
    vars(copied).update(vars(cache))
    copied.layers = []
    for layer in cache.layers:
        copied.layers.append(object.__new__(type(layer)))
        vars(copied.layers[-1]).update(vars(layer))
    return copied


# Sliding windows. Their layers drop tokens that are out of the window. A graph leaves that to its caller, because the
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
