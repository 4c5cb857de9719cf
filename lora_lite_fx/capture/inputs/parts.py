"""Put the tokens that stand for the parts of example images and sounds into example text."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ..forward_signature import signature_of
from .config_values import BATCH, READS_VALUES, Inputs, Values, required
from .images import IMAGES
from .other_media import SOUNDS

# The fields of a config that name such a token, and the methods of a model that compute the parts.
_IMAGE_TOKENS = (
    *("image_token_id", "image_token_index", "img_context_token_id", "video_token_id", "video_token_index"),
)
_SOUND_TOKENS = ("audio_token_id", "audio_token_index")
_TEXT = {"input_ids", "attention_mask", "decoder_input_ids"}


def with_parts(values: Values, inputs: Inputs) -> Inputs:
    """Put the token that stands for a part of an image or of a sound into `input_ids`, as often as each has parts."""
    if "input_ids" not in inputs:
        return inputs
    shown = any(name in inputs for name in IMAGES)
    if shown and "image_embeds_position_mask" in values.parameters:
        ids, shows = _with_tokens(inputs["input_ids"], 1, values.field("latent_query_num"))
        return {**inputs, **_masks(values, ids), "input_ids": ids, "image_embeds_position_mask": shows.long()}
    heard = any(name in inputs for name in SOUNDS)
    if heard and (made := _put(values, inputs, _SOUND_TOKENS, "get_audio_features")) is not None:
        inputs = made[0]
    images = ("get_image_features", "get_video_features")
    if not shown or (made := _put(values, inputs, _IMAGE_TOKENS, *images)) is None:
        return inputs
    inputs, shows = made
    if "mm_token_type_ids" in values.parameters:
        inputs["mm_token_type_ids"] = shows.long()
    inputs |= _positions(values, inputs)
    if attends_by_type(values.model):
        inputs["token_type_ids"] = (~shows).long()
    return inputs


def _put(values: Values, inputs: Inputs, tokens: tuple[str, ...], *methods: str) -> tuple[Inputs, Tensor] | None:
    """Return the inputs with the tokens, and where these are; None if the model has none.

    Args:
        values, inputs: of the model.
        tokens: fields that may name the token.
        methods: those of the model that may compute the parts.

    Raises:
        ValueError: the config leaves the token out, and the model would look for it in vain.
    """
    token = next((value for name in tokens if (value := getattr(values.config, name, None)) is not None), None)
    features_of = next((method for name in methods if (method := values.method(name)) is not None), None)
    if token is None or features_of is None:
        declared = [name for name in tokens if hasattr(values.config, name)]
        if declared and features_of is not None:
            raise ValueError(f"{declared[0]} of the config names no token for them")
        if token is None or tokens != _SOUND_TOKENS:
            return None
    # Qwen2-Audio, which has no such method, puts all parts of a sound in place of one token.
    count = 1 if features_of is None else _parts(values, features_of, inputs)
    ids, shows = _with_tokens(inputs["input_ids"], token, count)
    return {**inputs, **_masks(values, ids), "input_ids": ids}, shows


def _parts(values: Values, features_of: Any, inputs: Inputs) -> int:
    """Return how many parts each image or sound has for the model."""
    takes, needs = inspect.signature(features_of).parameters, required(features_of)
    given = {n: value for n, value in inputs.items() if n in needs or (n in takes and n not in _TEXT)}
    try:
        with values.without_data(given) as fakes:
            features = features_of(**fakes)
    except READS_VALUES:  # of the grid
        features = values.run(features_of, given)
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
    features = features if isinstance(features, (list, tuple)) else [features]
    parts: int = sum(math.prod(sample.shape[:-1]) for sample in features)
    return parts // BATCH


def _with_tokens(ids: Tensor, token: int, count: int) -> tuple[Tensor, Tensor]:
    """Return tokens with `count` of them after the first; and where these are."""
    text = ids.where(ids != token, 0 if token else 1)
    ids = torch.cat([text[:, :1], torch.full_like(ids[:, :1], token).expand(-1, count), text[:, 1:]], dim=1)
    return ids, ids == token


def _masks(values: Values, ids: Tensor) -> Inputs:
    return {"attention_mask": torch.ones_like(ids)} if "attention_mask" in values.parameters else {}


def _positions(values: Values, inputs: Inputs) -> Inputs:
    """Return positions along the sides of images, which a model otherwise computes in a loop over all tokens."""
    index = values.method("get_rope_index")
    if index is None or "position_ids" not in values.parameters:
        return {}
    takes = inspect.signature(index).parameters
    if any(name not in inputs for name in required(index)):
        return {}
    known = dict(inputs)
    if "feature_attention_mask" in inputs:
        known["audio_seqlens"] = inputs["feature_attention_mask"].sum(-1)
    positions, _ = index(**{name: value for name, value in known.items() if name in takes})
    return {"position_ids": positions}


def attends_by_type(model: Any) -> bool:
    """Tell whether tokens see all others unless their types say otherwise, as in PaliGemma."""
    config = getattr(model, "config", None)
    if "token_type_ids" not in signature_of(model).parameters or config is None:
        return False
    return bool(getattr(config.get_text_config(), "use_bidirectional_attention", False))
