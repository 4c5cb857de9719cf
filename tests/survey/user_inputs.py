"""The inputs that a user passes to models whose configs do not tell what a call takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

_LENGTH = 7
_WORDS = 55  # those behind have a meaning in the tiny configs


def with_calls(model: Any, inputs: Callable[[Any, int], Inputs]) -> Any:
    """Return the model, with `survey_calls`: an example of three samples, and a call of two."""
    model.survey_calls = {"example": inputs(model, 3), "other batch": inputs(model, 2)}
    return model


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, _WORDS, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _images(config: Any, batch: int) -> Tensor:
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _drawn(batch, 3, height, width)


def _with_image_tokens(batch: int, token: int, count: int) -> tuple[Tensor, Tensor]:
    """Return text that begins with `count` tokens that stand for an image, and where these are."""
    ids = torch.cat([torch.full((batch, count), token), _tokens(batch, _LENGTH)], 1)
    return ids, ids == token


def _robot(model: Any, batch: int) -> Inputs:
    config, vision = model.config, model.config.vlm_config.vision_config
    ids, _ = _with_image_tokens(batch, config.vlm_config.image_token_id, (vision.image_size // vision.patch_size) ** 2)
    return {
        "state": _drawn(batch, config.max_state_dim),
        "noise": _drawn(batch, config.chunk_size, config.max_action_dim),
        "timestep": torch.linspace(0.2, 0.9, batch),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _images(vision, batch)[:, None],
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
        "actions": _drawn(batch, config.chunk_size, config.max_action_dim),
    }


def _prompted_by_a_mask(model: Any, batch: int) -> Inputs:
    height, width = model.config.image_size
    images = _drawn(3, batch, 3, height // 2, width)  # of a prompt and of what it asks for, one upon the other
    return {"pixel_values": images[0], "prompt_pixel_values": images[1], "prompt_masks": images[2]}


def _classes_and_tasks(model: Any, batch: int) -> Inputs:
    return {
        "pixel_values": _images(model.config, batch),
        "classes_input_ids": _tokens(2 * batch, _LENGTH),
        "classes_attention_mask": torch.ones(2 * batch, _LENGTH, dtype=torch.int64),
        "tasks_input_ids": _tokens(batch, _LENGTH),
        "tasks_attention_mask": torch.ones(batch, _LENGTH, dtype=torch.int64),
        "classes_structure": torch.full((batch,), 2),
    }


def _video_of_one(model: Any, batch: int) -> Inputs:
    ids = _tokens(1, 4 + batch)  # the class takes one video
    size = model.config.max_img_size
    return {
        "input_ids": ids,
        "pixel_values": _drawn(1, model.config.num_frames, 3, size, size),
        "attention_mask": torch.ones_like(ids),
    }


def _assistant(model: Any, batch: int) -> Inputs:
    layers, config = model.model.layers, model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", 1)
    states = {
        layer.self_attn.layer_type: tuple(_drawn(2, batch, heads, _LENGTH, layer.self_attn.head_dim))
        for layer in layers
    }
    return {
        "inputs_embeds": _drawn(batch, 1, 2 * model.config.backbone_hidden_size),
        "shared_kv_states": states,
        "position_ids": torch.full((batch, 1), _LENGTH - 1),
    }


def _assistant_of_blocks(model: Any, batch: int) -> Inputs:
    config = model.config
    return {
        "noise_embeds": _drawn(batch, config.block_size, config.hidden_size),
        "context_hidden_states": _drawn(batch, _LENGTH, config.hidden_size * len(config.target_layer_ids)),
    }


def _spectrogram_and_padding(model: Any, batch: int) -> Inputs:
    padding = torch.zeros(batch, 32, dtype=torch.bool)
    padding[0, -8:] = True
    return {"audio_mel": _drawn(batch, 32, model.config.input_feat_size), "audio_mel_mask": padding}


def _speech_to_learn(model: Any, batch: int) -> Inputs:
    ids = _tokens(batch, _LENGTH)
    bins = getattr(model.config, "model_config", model.config).num_mel_bins
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "spectrogram_labels": _drawn(batch, 2 * _LENGTH, bins),
        "duration_labels": torch.full((batch, _LENGTH), 2),
        "pitch_labels": _drawn(batch, _LENGTH, 1),
        "energy_labels": _drawn(batch, _LENGTH, 1),
    }


def _crops_and_their_pools(model: Any, batch: int) -> Inputs:
    vision = model.config.vision_config
    patches = vision.num_position_embeddings
    side = int(patches**0.5)
    pools = torch.arange(patches).view(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    ids, shows = _with_image_tokens(batch, model.config.image_patch_id, len(pools))
    # Since transformers 5.25 patches are counted within each image, and before it over all images.
    counts_within = "image_num_crops" in signature(model.forward).parameters
    firsts = torch.zeros(batch, dtype=torch.long) if counts_within else patches * torch.arange(batch)
    crops = {"image_num_crops": torch.ones(batch, dtype=torch.long)} if counts_within else {}
    return crops | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _drawn(batch, patches, 3 * vision.patch_size**2),
        "image_token_pooling": (firsts[:, None, None] + pools).flatten(0, 1),
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]] * batch),
        "mm_token_type_ids": shows.long(),
        "labels": ids,
    }


def _image_to_change(model: Any, batch: int) -> Inputs:
    config, vision = model.config, model.config.vision_config
    grid = [1, 2, 2]
    ids, _ = _with_image_tokens(batch, config.image_token_id, 4)
    start, end = (torch.full((batch, 1), each) for each in (config.image_start_token_id, config.image_end_token_id))
    ids = torch.cat([start, ids[:, :4], end, ids[:, 4:], start], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _drawn(batch * 4, 3 * vision.patch_size**2),
        "image_grid_thw": torch.tensor([grid, grid] * batch),  # of the image, and of the one to be made
        "images_per_sample": torch.full((batch,), 2),
    }


USER_INPUTS: Mapping[str, Callable[[Any, int], Inputs]] = {
    "pi0": _robot,
    "seggpt": _prompted_by_a_mask,
    "omdet-turbo": _classes_and_tasks,
    "tvp": _video_of_one,
    "gemma4_assistant": _assistant,
    "gemma4_unified_assistant": _assistant,
    "muse_glimmer_assistant": _assistant_of_blocks,
    "gemma3n_audio": _spectrogram_and_padding,
    "fastspeech2_conformer": _speech_to_learn,
    "fastspeech2_conformer_with_hifigan": _speech_to_learn,
    "molmo2": _crops_and_their_pools,
    "glm_image": _image_to_change,
}
"""By model type, what makes the inputs of a call for a model and a number of samples."""
