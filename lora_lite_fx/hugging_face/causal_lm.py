"""Bring the calls of a causal language model that train, prefill and decode into one form.

In that form a call has a cache (empty at first), a mask, positions, and the positions whose logits are wanted; the
loss is computed from the logits. A small run of the model shows which of these steps mean the same to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.forward_signature import forward_signature
from ..execution.layer import plain_class
from ..graph.modes import in_mode

# Every dynamic dimension of an example has a size of its own, and none is one: torch.export specializes ones.
BATCH, LENGTH, PAST = 3, 7, 5
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments that `generate` reads, for its stop strings, and passes on to models, which do not."""

_OF_FLASH_ATTENTION = ("max_length_q", "max_length_k")
"""Numbers that collators of packed texts pass and that no other attention reads; each would have a graph of its own."""

_CACHES_IN_EVALUATION = ("cohere_compass", "t5gemma", "t5gemma2")
"""Types of models that make a cache in evaluation alone, if a call brings none, whatever it says in `use_cache`."""

_NO_STATES_IN_TRAINING = (*_CACHES_IN_EVALUATION, "falcon_mamba", "mamba", "mamba2", "rwkv")
"""Types of models that keep no states in training if a call does not say `use_cache`, whatever their config says."""

_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")

_OF_TEXT = (
    *("input_ids", "inputs_embeds", "attention_mask", "cached_mask", "position_ids", "token_type_ids"),
    *("mm_token_type_ids", *_LOSS_ARGUMENTS),
)
"""Arguments with a tensor that is as long as the text."""


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
        counts_positions: whether no positions mean those from the number of cached tokens on, padding included.
        has_plain_loss: whether its loss is its `loss_function` of all logits.
    """

    layers: tuple[EmptyLayer, ...]
    parameters: frozenset[str]
    counts_positions: bool
    has_plain_loss: bool


@dataclass
class NormalizedCall:
    """A call in the form in which the graph takes it, and the work that is left to do with the result.

    Args:
        arguments: by name; none is None.
        given: the objects of the caller that the call changes, by argument.
        loss: arguments of the model's loss function, if the loss is computed from the result.
        keeps_cache: whether the result has the cache.
    """

    arguments: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] | None = None
    keeps_cache: bool = True


def arguments_of(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the arguments of a call that differ from their defaults, and whether it returns a `ModelOutput`.

    Args:
        part: a model of transformers; or one of its modules, which has no config.
        args, kwargs: of the call.
    """
    from ..compat.transformers import CACHE, attention_of

    config = getattr(part, "config", None)
    signature = forward_signature(plain_class(type(part)))
    if CACHE in signature.parameters and CACHE not in kwargs and "past_key_values" in kwargs:  # its deprecated name
        kwargs = {**kwargs, CACHE: kwargs["past_key_values"]}
        del kwargs["past_key_values"]
    arguments: dict[str, Any] = {}
    for name, value in list(signature.bind(part, *args, **kwargs).arguments.items())[1:]:
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= value
        elif type(value) is not type(parameter.default) or value != parameter.default:
            arguments[name] = value
    if "use_cache" in signature.parameters and "use_cache" not in arguments:
        arguments["use_cache"] = _uses_cache(part)
    if "use_mems" in signature.parameters and "use_mems" not in arguments:  # XLNet's, switched by the mode
        arguments["use_mems"] = part.config.use_mems_train if part.training else part.config.use_mems_eval
    if part.training and torch.is_grad_enabled() and _checkpoints_layers(part):
        arguments["use_cache"] = False  # as the model does: a cache would keep the activations that checkpointing drops
    if arguments.get("use_cache") and CACHE not in arguments and not part.training:
        # Bring the cache that the model would make, because a graph of the call is captured in training too.
        arguments[CACHE] = _cache_of_evaluation(config)
    flash = "flash" in attention_of(config)
    for name in _OF_GENERATE if flash else (*_OF_GENERATE, *_OF_FLASH_ATTENTION):
        arguments.pop(name, None)
    if type(count := arguments.get("num_items_in_batch")) is int:
        arguments["num_items_in_batch"] = torch.tensor(count, device=part.device)  # as a Trainer counts
    return_dict = arguments.pop("return_dict", None)
    return_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return {name: value for name, value in arguments.items() if value is not None}, return_dict


def _uses_cache(part: Any) -> bool | None:
    """Return the `use_cache` of a call that does not say it; None if the config does not either."""
    if part.training and part.config.model_type in _NO_STATES_IN_TRAINING:
        return False
    uses_cache: bool | None = getattr(part.config.get_text_config(decoder=True), "use_cache", None)
    return uses_cache


def _cache_of_evaluation(config: Any) -> Any:
    """Return the cache that a model makes in evaluation alone; None for one that makes it in both modes or in none."""
    if getattr(config, "model_type", "") not in _CACHES_IN_EVALUATION:
        return None
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = DynamicCache(config=config.get_text_config(decoder=True))
    return EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache


def _checkpoints_layers(part: Any) -> bool:
    # The switches themselves: the property that reads them is deprecated in new transformers, its successor not in old.
    return any(getattr(module, "gradient_checkpointing", False) for module in part.modules())


def caches(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caches among the arguments of a call, which the call changes."""
    from transformers.cache_utils import Cache

    return {name: value for name, value in arguments.items() if isinstance(value, Cache)}


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
        positions = torch.arange(LENGTH, device=model.device).repeat(BATCH, 1)  # some models take a flat view
        placed = run(position_ids=positions) if "position_ids" in signature else None
        return Decoder(
            empty,
            frozenset(signature),
            placed is not None and _same(placed.logits, plain.logits),
            "labels" in signature and _has_plain_loss(model, run, ids),
        )


def _tried(model: Any, **arguments: Any) -> Any:
    """Return what the model returns; None if it raises.

    Kyutai's speech models take tokens in another form, with a column for each code. With labels GIT leaves out the
    logits of an image, although there is none.
    """
    try:
        return model(**arguments)
    except Exception:
        return None


def _has_plain_loss(model: Any, run: Any, ids: Tensor) -> bool:
    labels = ids.where(ids % 3 > 0, -100)
    labels[0, :3] = -100  # what padding predicts may be anything
    arguments: dict[str, Any] = {"labels": labels}
    if any(p.kind is p.VAR_KEYWORD for p in forward_signature(type(model)).parameters.values()):
        arguments["num_items_in_batch"] = 5
    result = run(**arguments)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if result is None or result.logits.shape != (*labels.shape, vocabulary):  # Higgs Audio's are those of codes
        return False
    return torch.equal(result.loss, loss_of(model, result.logits, arguments))


def _sees_behind(logits: Tensor) -> bool:
    """Return whether tokens before the last see it: it is what distinguishes the second text from the third."""
    one, other = logits[1, :-1], logits[2, :-1]
    return not torch.allclose(one, other, rtol=0, atol=0.01 * float(one.nan_to_num().abs().max()), equal_nan=True)


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit, with NaN equal to itself: some models compute NaN where there is nothing to attend to."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def loss_of(model: Any, logits: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Compute the loss as the model does."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    loss: Tensor = model.loss_function(logits=logits, vocab_size=vocabulary, **arguments)
    return loss


def normalize_call(
    model: Any, decoder: Decoder | None, arguments: dict[str, Any], fuses_loss: bool = False
) -> NormalizedCall:
    """Return the call in its normal form; as it is where that form would mean something else.

    Args:
        model: the model that is called.
        decoder: what a run of it has shown.
        arguments: by name; none is None.
        fuses_loss: whether the graph is to compute the loss, if there are labels, and not we from its logits.
    """
    from ..compat.transformers import CACHE

    as_it_is = NormalizedCall(arguments, caches(arguments))
    tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if decoder is None or tokens is None:
        return as_it_is
    arguments = dict(arguments)
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    text = model.config.get_text_config(decoder=True)
    use_cache = arguments.get("use_cache", True)
    if cache is None and mask is None and "position_ids" in arguments and not use_cache:
        return as_it_is  # positions that start again mark several texts in one row
    if "token_type_ids" in arguments and (cache is None or not cache.is_initialized):
        return as_it_is  # PaliGemma and Gemma 3 read types of tokens if the cache has not been opened yet
    batch, length = tokens.shape[:2]
    keeps_cache, callers_caches = cache is not None or bool(use_cache), caches(arguments)
    cache = _opened(cache, text, decoder, batch, tokens.device)
    arguments |= {CACHE: cache, "use_cache": True}
    if _only_appends(cache):
        past = cache.get_seq_length()
        if mask is None:
            mask = torch.ones(batch, past + length, dtype=torch.long, device=tokens.device)
        if mask.dim() == 2 and mask.shape[1] >= length:
            arguments["cached_mask"], arguments["attention_mask"] = mask[:, :-length], mask[:, -length:]
        if decoder.counts_positions and "position_ids" not in arguments:
            arguments["position_ids"] = torch.arange(past, past + length, device=tokens.device).repeat(batch, 1)
    if fuses_loss and "labels" in arguments:
        return NormalizedCall(arguments, callers_caches, None, keeps_cache)
    keep = arguments.get("logits_to_keep", 0)
    # Images and sound may make the text longer, and what is kept of it would be of other places.
    only_text = not any(isinstance(value, Tensor) for name, value in arguments.items() if name not in _OF_TEXT)
    if "logits_to_keep" in decoder.parameters and isinstance(keep, int) and only_text:
        arguments["logits_to_keep"] = torch.arange(length, device=tokens.device)[-keep:]
    loss = None
    if decoder.has_plain_loss and "labels" in arguments:
        loss = {name: arguments.pop(name) for name in _LOSS_ARGUMENTS if name in arguments}
    return NormalizedCall(arguments, callers_caches, loss, keeps_cache)


def join_mask(arguments: dict[str, Any]) -> None:
    """Join the mask from its two parts: as one input, its length would be a size of its own, with bounds."""
    if "cached_mask" in arguments:
        parts = [arguments.pop("cached_mask"), arguments["attention_mask"]]
        arguments["attention_mask"] = torch.cat(parts, dim=1)


def _opened(cache: Any, text: Any, decoder: Decoder, batch: int, device: torch.device) -> Any:
    """Return the cache, or a copy whose layers that have seen no token are initialized by an update with none."""
    from transformers.cache_utils import DynamicCache

    if cache is None:
        cache = DynamicCache(config=text)
    elif len(cache) == len(decoder.layers) and all(layer.is_initialized for layer in cache.layers):
        return cache
    opened = shallow(cache)
    for index, layer in enumerate(decoder.layers):
        if index == len(opened) and opened.layer_class_to_replicate is None:
            opened.layers.append(layer.made())
        if index >= len(opened) or not opened.layers[index].is_initialized:
            none = (t.new_empty((batch, *t.shape[1:]), device=device) for t in (layer.keys, layer.values))
            opened.update(*none, index)
    return opened


def shallow(cache: Any) -> Any:
    """Return a cache with layers of its own that hold the same tensors."""
    copied = object.__new__(type(cache))
    vars(copied).update(vars(cache))
    copied.layers = []
    for layer in cache.layers:
        copied.layers.append(object.__new__(type(layer)))
        vars(copied.layers[-1]).update(vars(layer))
    return copied


def _only_appends(cache: Any) -> bool:
    from transformers.cache_utils import DynamicCache

    return type(cache) is DynamicCache
