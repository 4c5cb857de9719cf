"""Tiny models of diffusers with random weights."""

from __future__ import annotations

from typing import Any

import torch

_GENERATOR = torch.Generator().manual_seed(3)
INPUTS = {
    "sample": torch.randn(2, 4, 8, 8, generator=_GENERATOR).double(),
    "timestep": torch.tensor([3, 5]),
    "encoder_hidden_states": torch.randn(2, 5, 8, generator=_GENERATOR).double(),
}


def unet() -> Any:
    """Return a UNet with attention to text, of one level."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    return model.double().eval()
