"""BOFT in PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ....variants import BOFT
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftAdapter, PeftForm


class _BOFT(PeftForm):
    def read(self, adapter: PeftAdapter) -> PeftAdapter:
        """Take the number of factors from the file: PEFT without CUDA makes one, whatever its config says."""
        adapter = super().read(adapter)
        rotations = [tensors["lora_boft_R"] for tensors in adapter.modules.values() if "lora_boft_R" in tensors]
        counts = {len(rotation) for rotation in rotations if rotation.dim()}
        if len(counts) != 1 or min(counts) == 0:
            return adapter
        variant: Any = adapter.variant
        return replace(adapter, variant=replace(variant, butterfly_factors=min(counts)))


FORMS = (
    _BOFT(
        BOFT,
        "BOFT",
        {
            "block_size": PeftField("boft_block_size", 4),
            "blocks": PeftField("boft_block_num", 0),
            "butterfly_factors": PeftField("boft_n_butterfly_factor", 1),
            "dropout": PeftField("boft_dropout", 0.0),
        },
        {
            "lora_boft_R": PeftTensor("boft_R"),
            "lora_boft_s": PeftTensor(
                "boft_s", Tensor.flatten, lambda t: t[:, None], conv=lambda s, kernel: s[None, :]
            ),
        },
        kinds=("linear", "conv"),
        kernels=(2,),
        own_conv=True,
    ),
)
