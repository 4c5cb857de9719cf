"""Build a tiny model of any config class of transformers, with random weights.

All widths of a config are divided by one number, so that the sums and quotients that a model takes of them still come
out; layers, experts, words and pixels become few. The first number for which the model can be built is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

_DIVISORS = (16, 8, 4, 2)
_MOST_PARAMETERS = 34_000_000
LAYERS, VOCABULARY, LENGTH = 2, 96, 64

_WIDTH = re.compile(
    r"(hidden|intermediate|inner|embd|embed|ffn|ff|model|head|kv|qk|q|v|k|rope|projection|proj|conv|fc|mlp|adapter|"
    r"output|out|in|state|key|value|lora|linear|condition|attention|bottleneck|upsample|residual|skip|feat|pooler|"
    r"latent|reduction|codebook|channel|x|encoder|decoder|expert|moe|shared|text|vision|audio|cross|mid|depth|z)?_?"
    r"(size|sizes|dim|dims|width|channels|rank|d_model|hidden_states|features)$|^(d|n)_(model|kv|ff|embd|inner|head_dim)$"
    r"|(^|_)(ffn_dim|head_dim|d_model|hidden_dim|dim|lora_rank|widths?|embedding_size)$|^width$|^channels$"
)
_NOT_WIDTH = re.compile(
    r"(patch|image|kernel|vocab|chunk|window|stride|batch|block|group|max|pool|crop|tile|grid|sample|input|merge|type|"
    r"num_channels|in_channels|in_chans|conv_kernel|codebook_size|dilation|num_labels|context|buffer|spatial|temporal|"
    r"segment|memory|pos_emb|shift|sliding|mel|stft|fft|hop|rate|input_feat|n_codes|cardinality|distance|bucket|step|char)"
)
_LAYERS = re.compile(
    r"^(n_layers?|num_(hidden_)?layers|num_(encoder|decoder)_layers|(encoder|decoder)_layers|depth)$"
    r"|num_.*(layers|blocks)$|_layers$|^layers$|_depth$"
)
_DEPTHS = re.compile(r"depths?$|^layers$|block_repeats|num_blocks$|_layers$|layer_repeats")
_EXPERTS = re.compile(r"(num|n)_.*experts$|^num_experts$|^moe_num_experts$")
_FEW_EXPERTS = re.compile(r"(experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|expert_top_k|num_selected_experts)$")
_LENGTHS = re.compile(r"(max_.*position|n_positions|n_ctx|max_.*length|max_seq|seq_length|context_length|_positions$)")
_INDICES = re.compile(r"(indices|indexes|index|layer_ids|layers_ids)$")
_TOKEN = re.compile(r"token(_id|_index|_ids)?$|_id$")


def tiny_config(config_class: type[PreTrainedConfig], divisor: int, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a config of this class with the same relations between its fields as its default, but small.

    Args:
        config_class: of transformers.
        divisor: of all widths.
        changes: fields to set, by path: `{"text_config.layer_types": [...]}`; and by an empty path what the default
            config is made with, if it is not valid without.
    """
    fields = _shrunk(config_class(**changes.get("", {})), divisor)
    for path, value in changes.items():
        if not path:
            continue
        *parents, name = path.split(".")
        inner = fields
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
    return config_class(**fields)


def tiny_model(model_class: Any, changes: Mapping[str, Any]) -> Any:
    """Return a small random model of this class in evaluation mode, without caches.

    Raises:
        Exception: of the last attempt, if none gives a model.
    """
    error: Exception = ValueError(f"{model_class.__name__} has too many parameters at every width")
    for divisor in _DIVISORS:
        torch.manual_seed(0)
        try:
            config = tiny_config(model_class.config_class, divisor, changes)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(config).parameters())
            if size > _MOST_PARAMETERS:
                raise ValueError(f"{size} parameters are too many")
            torch.manual_seed(0)
            model: Any = model_class(tiny_config(model_class.config_class, divisor, changes)).eval()
        except Exception as caught:
            error = caught
        else:
            if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
                # Pretrained models have it, and default configs may not.
                model.config.decoder_start_token_id = 0
                if model.can_generate():
                    model.generation_config.decoder_start_token_id = 0
            return randomized(model)
    raise error


def randomized(model: nn.Module) -> nn.Module:
    """Give parameters that start as zeros small random values: what is multiplied by zero hides every mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def _shrunk(config: PreTrainedConfig, divisor: int) -> dict[str, Any]:
    """Return the fields to build a small config from."""
    fields: dict[str, Any] = {}
    config.allow_global_per_layer_attribute_access = True  # asked for by those whose layers differ
    names = getattr(type(config), "__dataclass_fields__", None) or config.to_dict()
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**_shrunk(value, divisor), "model_type": value.model_type}
            continue
        declared = names[name]
        default = getattr(declared, "default", None if isinstance(names, dict) else value)
        # A field that the config derives from others when it is None is derived anew.
        if value is None or (default is None and not isinstance(value, int) and not _has_numbers(value)):
            continue
        small = _small(name, value, divisor)
        if small != default:
            fields[name] = small
    is_derived = isinstance(
        getattr(type(config), config.attribute_map.get("layer_types", "layer_types"), None), property
    )
    if (layer_types := _with_attention(getattr(config, "layer_types", None))) and not is_derived:
        fields["layer_types"] = layer_types
    if getattr(config, "out_features", None) and isinstance(fields.get("depths"), (list, tuple)):
        fields["out_features"] = list(config.out_features)  # of a backbone with all of its stages
    # What a graph cannot follow, and the error says how to switch off.
    fields |= {name: 0.0 for name in names if name.endswith("layerdrop")}
    fields |= {name: off for name, off in (("apply_spec_augment", False), ("rescale_every", 0)) if name in names}
    if "vocab_size" in names and config.vocab_size is None:
        fields["vocab_size"] = VOCABULARY
    text, vision = fields.get("text_config"), fields.get("vision_config")
    if text and vision and "out_hidden_size" in vision and "hidden_size" in text:  # what the images become are tokens
        vision["out_hidden_size"] = text["hidden_size"]
    return _with_patches(config, _with_heads(config, fields))


def _with_attention(types: Any) -> list[str]:
    """Return types of few layers, one of them attention, where the first few of `types` are all others; else nothing.

    A cache counts tokens in layers of attention.
    """
    if not isinstance(types, (list, tuple)) or not all(isinstance(kind, str) for kind in types):
        return []
    attention = [kind for kind in types if kind.endswith("attention") and kind != "linear_attention"]
    return [] if not attention or {*attention} & {*types[:LAYERS]} else [*types[: LAYERS - 1], attention[0]]


def _with_heads(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Make heads as many as a small width can have, whose own width is a multiple of four for rotary positions."""
    width = fields.get("hidden_size")
    name = "num_heads" if hasattr(config, "num_heads") else "num_attention_heads"
    heads, keys = getattr(config, name, None), getattr(config, "num_key_value_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int) or "head_dim" in fields or width % (4 * heads) == 0:
        return fields
    grouped = keys if isinstance(keys, int) and keys != heads else 1
    few = [count for count in range(1, heads) if width % (4 * count) == 0 and count % grouped == 0]
    if few:
        fields[name] = few[-1]
        if isinstance(keys, int) and keys == heads:
            fields["num_key_value_heads"] = few[-1]
    return fields


def _has_numbers(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, list) for item in value.values())


def _small(name: str, value: Any, divisor: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple, dict)):
        return value
    if isinstance(value, dict):
        return {key: _scaled_section(key, item, divisor) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _small_list(name, value, divisor)
    if _TOKEN.search(name):
        return value if value < VOCABULARY else VOCABULARY - 1 - value % 40
    if "vocab" in name and "size" in name:
        return min(value, VOCABULARY)
    if _FEW_EXPERTS.search(name):
        return min(value, 2)
    if _EXPERTS.search(name):
        return min(value, 4)
    if name in ("n_group", "topk_group"):
        return 1
    if _LENGTHS.search(name) and "token" not in name:
        return min(value, LENGTH)
    if name in ("sliding_window", "attention_window"):
        return min(value, 4)
    if _LAYERS.search(name):
        return min(value, LAYERS)
    if _is_width(name) and value >= 2 * divisor:
        return value // divisor
    return value


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NOT_WIDTH.search(name)


def _scaled_section(key: str, value: Any, divisor: int) -> Any:
    if key == "mrope_section" and isinstance(value, (list, tuple)):
        return [part // divisor for part in value]
    if key == "original_max_position_embeddings" and isinstance(value, int):
        return min(value, LENGTH)
    return value


def _small_list(name: str, value: Any, divisor: int) -> Any:
    if not value or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    if _TOKEN.search(name):
        return [_small("token_id", item, divisor) for item in value]
    if _INDICES.search(name):
        return sorted({min(item, LAYERS - 1) for item in value})
    if _DEPTHS.search(name):
        return [1 for _ in value]
    if _is_width(name) and min(value) >= 2 * divisor:
        small = [item // divisor for item in value]
        return small if name != "intermediate_size" else small[:LAYERS]  # one of each layer
    return value


def _with_patches(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Make images small: four patches a side, or 32 pixels where the patches are small."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    patch = max(patch) if isinstance(patch, (list, tuple)) else patch
    if size is None:
        return fields
    side = 4 * patch if isinstance(patch, int) and patch > 8 else 32
    fields["image_size"] = type(size)([side for _ in size]) if isinstance(size, (list, tuple)) else side
    return fields
