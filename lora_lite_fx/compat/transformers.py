"""Hold the private names of transformers that this library uses, and what its releases call by different names.

Importing this module imports transformers: import it in the functions that meet a model of transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .names import needed, preferred

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache among the arguments of a model and the fields of its results: `cache` since 5.24."""

KEYS_TO_IGNORE_ON_SAVE = "_keys_to_ignore_on_save"
"""The attribute of a model that names the tensors which its checkpoints leave out."""
needed(
    f"transformers.PreTrainedModel.{KEYS_TO_IGNORE_ON_SAVE}",
    "save_pretrained(state_dict=...), which whoever saves the model would have to pass, such as a Trainer",
)
needed(
    "transformers.PreTrainedConfig._attn_implementation",
    "PreTrainedModel.set_attn_implementation: sets what nothing public reads",
)
needed(
    "transformers.PreTrainedConfig._experts_implementation",
    "PreTrainedModel.set_experts_implementation: sets what nothing public reads",
)
preferred(
    "transformers.PreTrainedModel._can_set_experts_implementation",
    "PreTrainedModel.set_experts_implementation, which warns where a model has no experts to set it for",
    None,
)
needed("transformers.PreTrainedModel._from_config", "AutoModel.from_config, which knows no class that is named")
MASK_QUESTION = "_ignore_bidirectional_mask_sdpa"
"""The function of `transformers.masking_utils` that decides whether a mask in which tokens see all is left out."""
preferred(
    f"transformers.masking_utils.{MASK_QUESTION}",
    "create_bidirectional_mask: makes such a mask in each trace, which the graph then adds in each call",
    None,
)


def attention_of(config: Any) -> str:
    """Return how a model computes attention, such as "sdpa"; empty for a config that does not say."""
    return str(getattr(config, "_attn_implementation", None) or "")


def experts_of(config: Any) -> str | None:
    """Return how a model computes its experts, such as "grouped_mm"; None for a config that does not say."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def tells_experts(config: Any) -> bool:
    """Tell whether a config has the field of `experts_of`; those of other libraries have none."""
    return hasattr(config, "_experts_implementation")


def can_set_experts(model: Any) -> bool:
    """Tell whether `model` has experts whose implementation can be chosen."""
    ask = getattr(model, "_can_set_experts_implementation", None)
    return ask is None or bool(ask())


def set_experts(config: Any, name: str) -> None:
    """Let a model that is traced compute its experts in this way."""
    config._experts_implementation = name


def revision_of(config: Any) -> str | None:
    """Return the commit that a config was loaded from, if the release keeps it."""
    revision: str | None = getattr(config, "_commit_hash", None)
    return revision


def made_from_config(model_class: Any, config: PreTrainedConfig) -> Any:
    """Return a model of a class with random weights, in the types that its config names."""
    return model_class._from_config(config)


def keeps_all_tokens(layer: DynamicLayer) -> bool:
    """Tell whether a layer that slides was asked to keep what is out of its window, as releases since 5.17 can be."""
    return bool(getattr(layer, "record_past", False))


_LAYERS_KNOW_THEIR_BATCH = hasattr(Cache, "max_batch_size")


def tell_batch(cache: Any) -> None:
    """Tell the layers of a cache which batch they hold, as those of older releases know since their first tokens."""
    if not _LAYERS_KNOW_THEIR_BATCH:
        return
    halves = [getattr(cache, half, None) for half in ("self_attention_cache", "cross_attention_cache")]
    for layer in (layer for part in (cache, *halves) for layer in getattr(part, "layers", ())):
        states = [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor) and tensor.dim() > 2]
        for state in states[:1]:
            layer.max_batch_size = state.shape[0]
