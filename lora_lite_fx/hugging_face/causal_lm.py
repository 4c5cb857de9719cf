"""Bring the calls of a causal language model that train, prefill and decode into one form.

In that form a call has a cache (empty at first), a mask, positions, and the positions whose logits are wanted; the
loss is computed from the logits. `forms.py` finds out which of these steps mean the same to the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..capture.forward_signature import forward_signature
from ..execution.layer_modules import plain_class
from .caches import Decoder, caches, opened

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


Form = bool | None
"""Whether positions that a call of a kind lacks are those from the number of cached tokens on, padding included; None
for calls that a graph takes as they come."""


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


def with_loss(model: Any, call: NormalizedCall, result: Any) -> Any:
    """Return the result with the loss, as the model computes it, if that is left to compute."""
    if call.loss is None:
        return result
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    loss = model.loss_function(logits=result.logits, vocab_size=vocabulary, **call.loss)
    return type(result)(**{**result, "loss": loss})


def normalize_call(
    model: Any, decoder: Decoder | None, arguments: dict[str, Any], form: Form, fuses_loss: bool = False
) -> NormalizedCall:
    """Return the call in its normal form; as it is if it has none.

    Args:
        model: the model that is called.
        decoder: what a run of it has shown; None if it is not a causal language model.
        arguments: by name; none is None.
        form: that of calls of this kind, see `Forms`.
        fuses_loss: whether the graph is to compute the loss, if there are labels, and not we from its logits.
    """
    from transformers.cache_utils import DynamicCache

    from ..compat.transformers import CACHE

    as_it_is = NormalizedCall(arguments, caches(arguments))
    tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if decoder is None or form is None or tokens is None:
        return as_it_is
    arguments = dict(arguments)
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    use_cache = arguments.get("use_cache", True)
    if cache is None and mask is None and "position_ids" in arguments and not use_cache:
        return as_it_is  # positions that start again mark several texts in one row
    batch, length = tokens.shape[:2]
    keeps_cache, callers_caches = cache is not None or bool(use_cache), caches(arguments)
    cache = opened(cache, model.config, decoder.layers, batch, tokens.device)
    arguments |= {CACHE: cache, "use_cache": True}
    if type(cache) is DynamicCache:  # which only appends
        past = cache.get_seq_length()
        if mask is None:
            mask = torch.ones(batch, past + length, dtype=torch.long, device=tokens.device)
        if mask.dim() == 2 and mask.shape[1] >= length:
            arguments["cached_mask"], arguments["attention_mask"] = mask[:, :-length], mask[:, -length:]
        if form and "position_ids" not in arguments:
            arguments["position_ids"] = torch.arange(past, past + length, device=tokens.device).repeat(batch, 1)
    if fuses_loss and "labels" in arguments:
        return NormalizedCall(arguments, callers_caches, None, keeps_cache)
    keep = arguments.get("logits_to_keep", 0)
    # Images and sound may make the text longer, and what is kept of it would be of other places.
    only_text = not any(isinstance(value, Tensor) for name, value in arguments.items() if name not in _OF_TEXT)
    if (
        "logits_to_keep" in forward_signature(plain_class(type(model))).parameters
        and isinstance(keep, int)
        and only_text
    ):
        arguments["logits_to_keep"] = torch.arange(*slice(-keep, None).indices(length)[:2], device=tokens.device)
    loss = None
    if "labels" in arguments:
        loss = {name: arguments.pop(name) for name in _LOSS_ARGUMENTS if name in arguments}
    return NormalizedCall(arguments, callers_caches, loss, keeps_cache)


def join_mask(arguments: dict[str, Any]) -> None:
    """Join the mask from its two parts: as one input, its length would be a size of its own, with bounds."""
    if "cached_mask" in arguments:
        parts = [arguments.pop("cached_mask"), arguments["attention_mask"]]
        arguments["attention_mask"] = torch.cat(parts, dim=1)
