"""Bring the calls of a causal language model that train, prefill and decode into one form.

In that form a call has a cache (empty at first), a mask, positions, and the positions whose logits are wanted; the
loss is computed from the logits. `forms.py` finds out which of these steps mean the same to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.forward_signature import forward_signature
from ..execution.layer_modules import plain_class
from .decoder import Decoder

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


class Form(NamedTuple):
    """What is done to a call of a kind, as far as that means the same to the model.

    Args:
        counts: positions that are not given are those from the number of cached tokens on, padding included.
        loss_apart: the loss is the model's `loss_function` of all logits, and is computed from these.
    """

    counts: bool
    loss_apart: bool


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


def loss_of(model: Any, logits: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Compute the loss as the model does."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    loss: Tensor = model.loss_function(logits=logits, vocab_size=vocabulary, **arguments)
    return loss


def with_loss(model: Any, call: NormalizedCall, result: Any) -> Any:
    """Return the result with the loss, if that is left to compute."""
    if call.loss is None:
        return result
    return type(result)(**{**result, "loss": loss_of(model, result.logits, call.loss)})


def normalize_call(
    model: Any, decoder: Decoder | None, arguments: dict[str, Any], form: Form | None, fuses_loss: bool = False
) -> NormalizedCall:
    """Return the call in its normal form; as it is if it has none.

    Args:
        model: the model that is called.
        decoder: what a run of it has shown.
        arguments: by name; none is None.
        form: that of calls of this kind, see `find_form`.
        fuses_loss: whether the graph is to compute the loss, if there are labels, and not we from its logits.
    """
    from ..compat.transformers import CACHE

    as_it_is = NormalizedCall(arguments, caches(arguments))
    tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if decoder is None or form is None or tokens is None:
        return as_it_is
    arguments = dict(arguments)
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    text = model.config.get_text_config(decoder=True)
    use_cache = arguments.get("use_cache", True)
    if cache is None and mask is None and "position_ids" in arguments and not use_cache:
        return as_it_is  # positions that start again mark several texts in one row
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
        if form.counts and "position_ids" not in arguments:
            arguments["position_ids"] = torch.arange(past, past + length, device=tokens.device).repeat(batch, 1)
    if fuses_loss and "labels" in arguments:
        return NormalizedCall(arguments, callers_caches, None, keeps_cache)
    keep = arguments.get("logits_to_keep", 0)
    # Images and sound may make the text longer, and what is kept of it would be of other places.
    only_text = not any(isinstance(value, Tensor) for name, value in arguments.items() if name not in _OF_TEXT)
    if "logits_to_keep" in decoder.parameters and isinstance(keep, int) and only_text:
        arguments["logits_to_keep"] = torch.arange(length, device=tokens.device)[-keep:]
    loss = None
    if form.loss_apart and "labels" in arguments:
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
