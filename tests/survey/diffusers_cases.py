"""Tiny models of diffusers, and how a pipeline calls them: with two examples, and with one of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tiny import randomized

TEXT = 16  # the width of texts
CHANNELS = 4

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Diffuser:
    """A model to build.

    Args:
        inputs: makes the inputs of a call, for a batch, the side of images, and the length of texts.
        config: what the class is built with.
        sides: of the images of the example, and of the other call.
    """

    inputs: Callable[[int, int, int], Inputs]
    config: Inputs = field(default_factory=dict)
    sides: tuple[int, int] = (8, 12)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _steps(batch: int) -> Tensor:
    return torch.arange(1, batch + 1) * 100


def _image(batch: int, side: int, length: int) -> Inputs:
    return {
        "hidden_states": _drawn(batch, CHANNELS, side, side),
        "encoder_hidden_states": _drawn(batch, length, TEXT),
        "timestep": _steps(batch),
    }


def _video(batch: int, side: int, length: int) -> Inputs:
    return {**_image(batch, side, length), "hidden_states": _drawn(batch, CHANNELS, 2, side, side)}


def _frames(batch: int, side: int, length: int) -> Inputs:
    return {**_image(batch, side, length), "hidden_states": _drawn(batch, 2, CHANNELS, side, side)}


def _with_mask(inputs: Callable[[int, int, int], Inputs], dtype: torch.dtype) -> Callable[[int, int, int], Inputs]:
    def masked(batch: int, side: int, length: int) -> Inputs:
        mask = torch.ones(batch, length, dtype=dtype)
        mask[0, -2:] = 0
        return {**inputs(batch, side, length), "encoder_attention_mask": mask}

    return masked


def _sd3(batch: int, side: int, length: int) -> Inputs:
    return {**_image(batch, side, length), "pooled_projections": _drawn(batch, TEXT)}


def _flux(batch: int, side: int, length: int) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        **_sd3(batch, side, length),
        "hidden_states": _drawn(batch, side * side, CHANNELS),
        "timestep": _steps(batch) / 1000,
        "img_ids": torch.stack([0 * rows, rows, columns], -1).flatten(0, 1).float(),
        "txt_ids": torch.zeros(length, 3),
    }


def _classes(batch: int, side: int, length: int) -> Inputs:
    return {
        "hidden_states": _drawn(batch, CHANNELS, side, side),
        "timestep": _steps(batch),
        "class_labels": torch.arange(batch),
    }


def _pixart(batch: int, side: int, length: int) -> Inputs:
    nothing = {"resolution": None, "aspect_ratio": None}
    return {**_image(batch, side, length), "added_cond_kwargs": nothing}


def _cogview4(batch: int, side: int, length: int) -> Inputs:
    size = torch.tensor([[8 * side, 8 * side]]).repeat(batch, 1)
    return {
        **_image(batch, side, length),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def _ltx(batch: int, side: int, length: int) -> Inputs:
    inputs = _with_mask(_image, torch.bool)(batch, side, length)
    size = {"num_frames": 2, "height": side, "width": side}
    return {**inputs, **size, "hidden_states": _drawn(batch, 2 * side * side, CHANNELS)}


def _hunyuan(batch: int, side: int, length: int) -> Inputs:
    angles = torch.outer(torch.arange((side // 2) ** 2), torch.ones(8))
    return {
        **_image(batch, side, length),
        "timestep": _steps(batch).float(),
        "text_embedding_mask": torch.ones(batch, length),
        "encoder_hidden_states_t5": _drawn(batch, length, TEXT),
        "text_embedding_mask_t5": torch.ones(batch, length),
        "image_meta_size": torch.full((batch, 6), 8.0 * side),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _lumina2(batch: int, side: int, length: int) -> Inputs:
    inputs = _with_mask(_image, torch.bool)(batch, side, length)
    return {**inputs, "timestep": _steps(batch) / 1000}


def _unet(batch: int, side: int, length: int) -> Inputs:
    return {"sample": _drawn(batch, CHANNELS, side, side), "timestep": _steps(batch)}


def _unet_of_texts(batch: int, side: int, length: int) -> Inputs:
    return {**_unet(batch, side, length), "encoder_hidden_states": _drawn(batch, length, TEXT)}


def _unet_of_videos(batch: int, side: int, length: int) -> Inputs:
    return {**_unet_of_texts(batch, side, length), "sample": _drawn(batch, CHANNELS, 2, side, side)}


def _unet_of_motion(batch: int, side: int, length: int) -> Inputs:
    return {**_unet_of_videos(batch, side, length), "encoder_hidden_states": _drawn(2 * batch, length, TEXT)}


def _unet_of_frames(batch: int, side: int, length: int) -> Inputs:
    times = torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1)
    return {
        **_unet_of_texts(batch, side, 1),
        "sample": _drawn(batch, 2, CHANNELS, side, side),
        "added_time_ids": times,
    }


def _unet_of_waves(batch: int, side: int, length: int) -> Inputs:
    return {"sample": _drawn(batch, CHANNELS, side * side), "timestep": _steps(batch)}


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_SIZES = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, **_HEADS}
_UNET = {
    "sample_size": 8,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_ATTENDS = {"cross_attention_dim": TEXT, "attention_head_dim": 4}

DIFFUSERS: dict[str, Diffuser] = {
    "SD3Transformer2DModel": Diffuser(
        _sd3,
        {
            **_SIZES,
            "sample_size": 8,
            "patch_size": 2,
            "num_layers": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "FluxTransformer2DModel": Diffuser(
        _flux,
        {
            "patch_size": 1,
            "in_channels": CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            **_HEADS,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "axes_dims_rope": (2, 2, 4),
        },
        (4, 6),
    ),
    "PixArtTransformer2DModel": Diffuser(
        _pixart,
        {**_SIZES, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": TEXT}
        | {"use_additional_conditions": False, "num_embeds_ada_norm": 1000},
    ),
    "WanTransformer3DModel": Diffuser(
        _video,
        {**_SIZES, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 24, "cross_attn_norm": True, "rope_max_seq_len": 16},
    ),
    "SanaTransformer2DModel": Diffuser(
        _image,
        {**_SIZES, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
        | {"caption_channels": TEXT, "sample_size": 8, "patch_size": 1},
    ),
    "Lumina2Transformer2DModel": Diffuser(
        _lumina2,
        {"sample_size": 8, "in_channels": CHANNELS, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2)}
        | {"axes_lens": (64, 64, 64), "cap_feat_dim": TEXT},
    ),
    "CogVideoXTransformer3DModel": Diffuser(
        _frames,
        {**_SIZES, "time_embed_dim": 4, "text_embed_dim": TEXT, "sample_width": 8, "sample_height": 8}
        | {"sample_frames": 8, "max_text_seq_length": 6, "use_rotary_positional_embeddings": False},
    ),
    "CogView4Transformer2DModel": Diffuser(
        _cogview4, {**_SIZES, "text_embed_dim": TEXT, "time_embed_dim": 8, "condition_dim": 4}
    ),
    "LTXVideoTransformer3DModel": Diffuser(
        _ltx, {**_SIZES, "cross_attention_dim": 16, "caption_channels": TEXT}, sides=(4, 6)
    ),
    "MochiTransformer3DModel": Diffuser(
        _with_mask(_video, torch.bool),
        {"in_channels": CHANNELS, "num_layers": 2, **_HEADS, "pooled_projection_dim": 16, "text_embed_dim": TEXT}
        | {"time_embed_dim": 4, "max_sequence_length": 6},
    ),
    "HunyuanDiT2DModel": Diffuser(
        _hunyuan,
        {"in_channels": CHANNELS, "num_layers": 1, **_HEADS, "sample_size": 8, "patch_size": 2, "hidden_size": 16}
        | {"cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "pooled_projection_dim": 8}
        | {"text_len": 6, "text_len_t5": 6},
    ),
    "DiTTransformer2DModel": Diffuser(
        _classes, {**_SIZES, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    ),
    "AuraFlowTransformer2DModel": Diffuser(
        _image,
        {"sample_size": 8, "in_channels": CHANNELS, "num_mmdit_layers": 1, "num_single_dit_layers": 1, **_HEADS}
        | {"joint_attention_dim": TEXT, "caption_projection_dim": 16, "pos_embed_max_size": 64},
    ),
    "UNet1DModel": Diffuser(
        _unet_of_waves,
        {"sample_size": 64, "in_channels": CHANNELS, "out_channels": CHANNELS, "block_out_channels": (32, 64)}
        | {"down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "norm_num_groups": 4, "extra_in_channels": 64}
        | {"up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip")},
    ),
    "UNet2DModel": Diffuser(
        _unet,
        {**_UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    ),
    "UNet2DConditionModel": Diffuser(
        _unet_of_texts,
        {**_UNET, **_ATTENDS, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    ),
    "UNet3DConditionModel": Diffuser(
        _unet_of_videos,
        {**_UNET, **_ATTENDS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
    ),
    "UNetMotionModel": Diffuser(
        _unet_of_motion,
        {**_UNET, "cross_attention_dim": TEXT, "num_attention_heads": 2, "motion_num_attention_heads": 2}
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        | {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
    ),
    "UNetSpatioTemporalConditionModel": Diffuser(
        _unet_of_frames,
        {"sample_size": 8, "in_channels": CHANNELS, "out_channels": CHANNELS, "block_out_channels": (32, 64)}
        | {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
        | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "layers_per_block": 1}
        | {"cross_attention_dim": TEXT, "num_attention_heads": (2, 4), "addition_time_embed_dim": 8}
        | {"projection_class_embeddings_input_dim": 24, "num_frames": 2},
    ),
}


def diffuser(name: str) -> Any:
    """Return the model with random weights, in evaluation mode; `survey_calls` has the inputs of its calls by name."""
    import diffusers

    case = DIFFUSERS[name]
    torch.manual_seed(0)
    model: Any = randomized(getattr(diffusers, name)(**case.config)).eval()
    # A model with a table of positions, or of frames, takes no other length of texts.
    model.survey_calls = {"example": case.inputs(2, case.sides[0], 6), "other sizes": case.inputs(1, case.sides[1], 6)}
    return model
