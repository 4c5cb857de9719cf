"""IA3 in PEFT, which lists the modules whose input is scaled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....adapters.variant import Variant
from ....sites.matching import Call
from ....sites.site import Site
from ....variants import IA3
from ..fields_and_tensors import PeftTensor
from ..form import PeftForm
from ..target_modules import name_patterns


class _IA3(PeftForm):
    def default_tables(self) -> dict[str, str]:
        return {**super().default_tables(), "feedforward_modules": "IA3_FEEDFORWARD"}

    def variant_of(self, config: Mapping[str, Any], new: bool) -> Variant:
        feedforward = config.get("feedforward_modules") or ()
        names = name_patterns(feedforward, "feedforward_modules", self.name, "")
        variant = super().variant_of(config, new)
        assert isinstance(variant, IA3)
        return replace(variant, feedforward_names=names)

    def config_of(self, variant: Variant, sites: Sequence[Site]) -> dict[str, Any]:
        feedforward = [re.escape(site.name) for site in sites if isinstance(variant, IA3) and variant.gates_input(site)]
        return {**super().config_of(variant, sites), "feedforward_modules": "|".join(feedforward) or []}

    def tensor_to_peft(self, variant: Variant, site: Site, name: str, tensor: Tensor) -> Tensor:
        if site.kernel:
            return tensor[(None, slice(None), *[None] * len(site.kernel))]
        return tensor[None, :] if isinstance(variant, IA3) and variant.gates_input(site) else tensor[:, None]

    def pads_otherwise(self, site: Site, call: Call) -> bool:
        return False  # PEFT scales around the module


FORMS = (
    _IA3(
        IA3,
        "IA3",
        {},
        {"lora_g": PeftTensor("ia3_l", to_ours=Tensor.flatten)},
        start="init_ia3_weights",
        conv1d=True,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(2, 3),
    ),
)
