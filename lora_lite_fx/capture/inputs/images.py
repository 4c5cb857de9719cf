"""Make example images for a transformers model, in the forms in which models take them.

Its arguments tell which form it takes: whole images, tiles, or patches in a row with their grid.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from .config_values import BATCH, SEQUENCE, Inputs, Values

IMAGES = ("pixel_values", "flattened_patches")
"""The arguments that images come in."""
_GRIDS = ("image_grid_thw", "image_grid_hw", "grid_thw")
_PLACES = ("image_position_ids", "pixel_position_ids")


def takes_images(values: Values) -> bool:
    """Tell whether the model computes something of images."""
    names = [name for name in IMAGES if name in values.parameters]
    if "grid_thw" in values.required:  # a tower for images alone
        return True
    is_main = any(name == values.model.main_input_name or name in values.required for name in names)
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
    elif any(name in arguments for name in _PLACES):
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
    patches = "hidden_states" if "hidden_states" in values.required else "pixel_values"
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
    name = next(name for name in _PLACES if name in values.parameters)
    yield {"pixel_values": patches, name: places.expand(BATCH, -1, -1).contiguous()}


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
    yield {"pixel_values": values.noise(BATCH, 2, channels, height, width)}  # pairs, in which points are matched
