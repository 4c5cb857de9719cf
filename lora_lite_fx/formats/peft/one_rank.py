"""The form of methods that give all sites one rank in PEFT, whatever `rank_pattern` says: AdaLoRA and HiRA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...adapters.placement import Placement
from ...adapters.variant import Variant
from ...errors import ConfigError
from .form import PeftAdapter, PeftForm


class OneRankForm(PeftForm):
    """A form whose files are read with the ranks of their tensors, and written with the largest rank for all."""

    def start_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("rank_pattern"):
            raise ConfigError(
                f"{self.name}: PEFT gives all its sites the rank r, whatever rank_pattern says. Leave it out, or write"
                f" {self.name}(rank_pattern=...) here."
            )
        return super().start_fields(config)

    def read(self, adapter: PeftAdapter) -> PeftAdapter:
        adapter = super().read(adapter)
        # A tensor that is a number is refused later, as every other wrong shape.
        ranks = {
            module: len(tensors["lora_A"])
            for module, tensors in adapter.modules.items()
            if "lora_A" in tensors and tensors["lora_A"].dim()
        }
        left = {module: tensors for module, tensors in adapter.modules.items() if ranks.get(module) != 0}
        variant: Any = adapter.variant
        others = {f"^{re.escape(module)}$": rank for module, rank in ranks.items() if rank not in (0, variant.r)}
        return replace(adapter, modules=left, variant=replace(variant, rank_pattern=others))

    def as_written(
        self, model: nn.Module, variant: Variant, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[Variant, Mapping[str, Tensor]]:
        """Return the adapter with the largest of its ranks everywhere; products with the zeros that are added are zero.

        The scale of AdaLoRA depends on the rank, so its `E` makes up for the difference.
        """
        r = max(state[placement.tensors["lora_A"]].shape[0] for placement in placed)
        tensors = {}
        for placement in placed:
            for name, qualified in placement.tensors.items():
                tensor = state[qualified]
                lacking = r - tensor.shape[0 if name in ("lora_A", "lora_E") else 1]
                if name == "lora_E":
                    before: Any = placement.local
                    tensor = tensor * ((r + 1e-5) / (before.r + 1e-5))
                tensors[qualified] = F.pad(tensor, (0, 0, 0, lacking) if name == "lora_A" else (0, lacking))
        one_rank: Any = variant
        return replace(one_rank, r=r, rank_pattern=()), tensors
