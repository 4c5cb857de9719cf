"""Make example images for a transformers model, in the forms in which models take them.

Its arguments tell which form it takes: whole images, tiles, or patches in a row with their grid. Text that shows images
has a token for each part of one.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .example_values import BATCH, READS_VALUES, SEQUENCE, Inputs, Values

IMAGES = ("pixel_values", "flattened_patches")
"""The arguments that images come in."""
_GRIDS = ("image_grid_thw", "image_grid_hw", "grid_thw")


def takes_images(values: Values) -> bool:
    """Tell whether the model computes something of images."""
    names = [name for name in IMAGES if name in values.parameters]
    if "grid_thw" in values.required():  # a tower for images alone
        return True
    is_main = any(name == values.model.main_input_name or name in values.required() for name in names)
    return bool(names) and (is_main or values.field("vision_config", "patch_size", "image_size") is not None)


def images(values: Values) -> Iterator[Inputs]:
    """Yield images in each form that the arguments allow, those first that tell most."""
    arguments = values.parameters
    if "flattened_patches" in arguments:
        yield from _flattened(values)
    elif any(name in arguments for name in _GRIDS):
        yield from _patches_with_grid(values)
    elif "spatial_shapes" in arguments:
        shapes, patches = values.rows([2, 4]), values.noise(BATCH, 8, _numbers(values))
        yield {"pixel_values": patches, "pixel_attention_mask": values.ones(BATCH, 8), "spatial_shapes": shapes}
    elif "target_sizes" in arguments:
        channels, patch = values.pixels()[0], values.side("patch_size") or 1
        strip = values.noise(1, channels, patch, BATCH * 32 * patch)  # of patches beside each other
        yield {"pixel_values": strip, "target_sizes": values.rows([4, 8])}
    elif "image_position_ids" in arguments:
        yield from _placed_patches(values)
    elif "aspect_ratio_ids" in arguments and (tiles := values.field("max_num_tiles")):
        yield {
            "pixel_values": values.noise(BATCH, 1, tiles, *values.pixels()),
            "aspect_ratio_ids": values.ones(BATCH, 1),
            "aspect_ratio_mask": values.ones(BATCH, 1, tiles),
            "cross_attention_mask": values.ones(BATCH, SEQUENCE, 1, tiles),
        }
    else:
        yield from _whole_and_tiles(values)


def _numbers(values: Values) -> int:
    """Return how many numbers a patch has."""
    patch = values.side("patch_size")
    if patch is None:
        return values.field("patch_embed_hidden_size") or values.pixels()[0]
    return values.pixels()[0] * patch * patch


def _patches_with_grid(values: Values) -> Iterator[Inputs]:
    """Yield the patches of all images in a row, with the rows and columns of each image."""
    channels, patch = values.pixels()[0], values.side("patch_size") or 1
    merge = values.side("spatial_merge_size", "merge_size", "merge_kernel_size") or 1
    side = 2 * merge
    count = BATCH * 2 * side * side
    grid = next(name for name in _GRIDS if name in values.parameters)
    if grid == "image_grid_hw":
        layout = {grid: values.rows([2 * side, 4 * side])}
        count *= 4
    else:
        layout = {grid: values.rows([1, side, 2 * side])}
    for name in ("image_merge_sizes", "merge_sizes"):
        if name in values.parameters:
            layout[name] = torch.full((BATCH,), merge, device=values.model.device)
    patches = "hidden_states" if "hidden_states" in values.required() else "pixel_values"
    frames = values.field("temporal_patch_size", "patch_temporal") or 1
    shapes = (
        (count, _numbers(values) * frames),
        (count, _numbers(values)),
        (count, channels, patch, patch),
        (1, count, channels, patch, patch),
        (count, patch * merge, patch * merge, channels),
    )
    for shape in dict.fromkeys(shapes):
        yield {patches: values.noise(*shape), **layout}


def _flattened(values: Values) -> Iterator[Inputs]:
    """Yield patches that begin with their row and column, which count from one."""
    places = torch.cartesian_prod(torch.arange(1.0, 3.0), torch.arange(1.0, 5.0)).to(values.model.device)
    patches = values.noise(BATCH, 8, _numbers(values))
    yield {"flattened_patches": torch.cat([places.to(patches.dtype).expand(BATCH, -1, -1), patches], 2)}


def _placed_patches(values: Values) -> Iterator[Inputs]:
    """Yield patches with the column and row of each."""
    side = 2 * (values.side("pooling_kernel_size") or 1)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(2 * side)).flip(1).to(values.model.device)
    patches = torch.rand(BATCH, len(places), _numbers(values), generator=values.generator)
    patches = patches.to(values.model.device, values.model.dtype)
    yield {"pixel_values": patches, "image_position_ids": places.expand(BATCH, -1, -1).contiguous()}


def _whole_and_tiles(values: Values) -> Iterator[Inputs]:
    channels, height, width = values.pixels()
    known: Inputs = {}
    if "image_sizes" in values.parameters:
        known["image_sizes"] = values.rows([height, width])
    if "high_res_pixel_values" in values.parameters:
        fine = getattr(values.field("high_res_vision_config"), "image_size", None) or height
        known["high_res_pixel_values"] = values.noise(BATCH, channels, fine, fine)
    # Models that show an image whole and in tiles have a function of this name, which counts them.
    count = getattr(sys.modules[type(values.model).__module__], "image_size_to_num_patches", None)
    if (pinpoints := getattr(values.config, "image_grid_pinpoints", None)) and count is not None:
        tiles = count((height, width), pinpoints, height)
        yield {"pixel_values": values.noise(BATCH, tiles, channels, height, width), **known}
    pixels = values.noise(BATCH, channels, height, width)
    several = {"pixel_values": pixels.unsqueeze(1), **known}
    if "image_attention_mask" in values.parameters:
        several["image_attention_mask"] = values.ones(BATCH, SEQUENCE, 1)
    if "tile_fine_mask" in values.parameters:  # the first tile shows all of the image, the second a part
        mask = values.ones(BATCH, 2).bool()
        tiles = values.noise(BATCH, 2, channels, height, width)
        yield {"pixel_values": tiles, "pixel_attention_mask": mask, "tile_fine_mask": mask & mask.new_tensor([0, 1])}
    if {"pixel_attention_mask", "image_attention_mask"} & set(values.parameters):
        yield several
    yield {"pixel_values": pixels}
    if known:
        yield {"pixel_values": pixels, **known}
    yield several
    if frames := values.field("num_frames"):
        yield {"pixel_values": pixels.unsqueeze(1).repeat(1, frames, 1, 1, 1)}
    yield {"pixel_values": values.noise(BATCH, 8, _numbers(values))}


# Text that shows images.

_TEXT = {"input_ids", "attention_mask", "decoder_input_ids"}


def with_parts(values: Values, inputs: Inputs) -> Inputs:
    """Put the token that stands for a part of an image into `input_ids`, as often as an image has parts."""
    if "input_ids" not in inputs or not any(name in inputs for name in IMAGES):
        return inputs
    if "image_embeds_position_mask" in values.parameters:
        ids, shows = _with_tokens(inputs["input_ids"], 1, values.field("latent_query_num"))
        return {**inputs, **_masks(values, ids), "input_ids": ids, "image_embeds_position_mask": shows.long()}
    names = ("image_token_id", "image_token_index", "img_context_token_id", "video_token_id", "video_token_index")
    token = next((value for name in names if (value := getattr(values.config, name, None)) is not None), None)
    features_of = values.method("get_image_features") or values.method("get_video_features")
    if token is None or features_of is None:
        return inputs
    ids, shows = _with_tokens(inputs["input_ids"], token, _parts(values, features_of, inputs))
    inputs = {**inputs, **_masks(values, ids), "input_ids": ids}
    if "mm_token_type_ids" in values.parameters:
        inputs["mm_token_type_ids"] = shows.long()
    inputs |= _positions(values, inputs)
    if attends_by_type(values.model):
        inputs["token_type_ids"] = (~shows).long()
    return inputs


def _parts(values: Values, features_of: Any, inputs: Inputs) -> int:
    """Return how many parts each image has for the model."""
    takes = inspect.signature(features_of).parameters
    given = {name: value for name, value in inputs.items() if name in takes and name not in _TEXT}
    try:
        with values.without_data(given) as fakes:
            features = features_of(**fakes)
    except READS_VALUES:  # of the grid
        features = values.run(features_of, given)
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
    features = features if isinstance(features, (list, tuple)) else [features]
    parts: int = sum(math.prod(image.shape[:-1]) for image in features)
    return parts // BATCH


def _with_tokens(ids: Tensor, token: int, count: int) -> tuple[Tensor, Tensor]:
    """Return tokens with `count` of those for images after the first; and where these are."""
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
    required = (p.name for p in takes.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    if any(name not in inputs for name in required):
        return {}
    positions, _ = index(**{name: value for name, value in inputs.items() if name in takes})
    return {"position_ids": positions}


def attends_by_type(model: Any) -> bool:
    """Tell whether tokens see all others unless their types say otherwise, as in PaliGemma."""
    config = getattr(model, "config", None)
    if "token_type_ids" not in inspect.signature(model.forward).parameters or config is None:
        return False
    return bool(getattr(config.get_text_config(), "use_bidirectional_attention", False))
