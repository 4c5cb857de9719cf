"""Find out by small runs what a causal language model is: which layers its cache has, and that it appends to these."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.forward_signature import forward_signature
from ..graph.modes import in_mode

# Every dynamic dimension of an example has a size of its own, and none is one: torch.export specializes ones.
BATCH, LENGTH, PAST = 3, 7, 5


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


@dataclass(frozen=True)
class Decoder:
    """The facts that a run of a causal language model has shown.

    Args:
        layers: those of its cache, which may be more than its config says: Dory adds some for layers that run twice.
        parameters: names of the arguments that it takes.
    """

    layers: tuple[EmptyLayer, ...]
    parameters: frozenset[str]


@torch.no_grad()
def probe(model: Any) -> Decoder | None:
    """Run `model` on a few tokens, left-padded, and on one more.

    Returns:
        What that shows. None if the model is not a causal language model that appends tokens, and these alone, to its
        cache: GIT widens masks by the tokens of an image. None too if tokens see those behind them in texts without
        padding alone: `is_causal = False` on a module of attention says so, and with a mask it has no effect.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    from ..compat.transformers import CACHE

    signature = forward_signature(type(model)).parameters
    takes_cache = {"input_ids", "attention_mask", CACHE, "use_cache"} <= signature.keys()
    # Encoders and classifiers take a cache too, but theirs is another result than logits for each token.
    if not takes_cache or not model.can_generate() or model.config.is_encoder_decoder:
        return None
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (BATCH, LENGTH), generator=generator).to(model.device)
    ids[2] = ids[1]
    ids[2, -1] = (ids[1, -1] + 1) % text.vocab_size  # for `_sees_behind`
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def run(**more: Any) -> Any:
        cache = DynamicCache(config=text)
        return _tried(model, **{"input_ids": ids, "attention_mask": mask, CACHE: cache, "use_cache": True, **more})

    with in_mode(model, False):
        plain = run()
        if not isinstance(getattr(plain, CACHE, None), DynamicCache):
            return None  # BertLMHeadModel that is not a decoder
        without_padding = run(attention_mask=None)
        if without_padding is not None and _sees_behind(without_padding.logits) != _sees_behind(plain.logits):
            return None
        longer = torch.cat([mask, mask[:, -1:]], dim=1)
        if run(input_ids=ids[:, :1], attention_mask=longer, **{CACHE: copy.deepcopy(plain[CACHE])}) is None:
            return None
        layers = plain[CACHE].layers
        if not all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized for layer in layers
        ):
            return None
        empty = tuple(
            EmptyLayer(layer.keys[:1, :, :0], layer.values[:1, :, :0], getattr(layer, "sliding_window", None))
            for layer in layers
        )
        return Decoder(empty, frozenset(signature))


def _tried(model: Any, **arguments: Any) -> Any:
    """Return what the model returns; None if it raises.

    Kyutai's speech models take tokens in another form, with a column for each code.
    """
    try:
        return model(**arguments)
    except Exception:
        return None


def _sees_behind(logits: Tensor) -> bool:
    """Return whether tokens before the last see it: it is what distinguishes the second text from the third."""
    one, other = logits[1, :-1], logits[2, :-1]
    return not torch.allclose(one, other, rtol=0, atol=0.01 * float(one.nan_to_num().abs().max()), equal_nan=True)
