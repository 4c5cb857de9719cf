"""SHiRA in PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ....adapters.variant import Variant
from ....sites.site import Site
from ....variants import SHiRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm


class _SHiRA(PeftForm):
    def reasons_against(self, variant: Variant, site: Site) -> Iterator[str]:
        yield from super().reasons_against(variant, site)
        if variant.for_site(site.name).params(site)["lora_S"].shape[0] == site.d_in * site.d_out:
            yield "wants fewer entries of SHiRA than the weight has"


FORMS = (
    _SHiRA(
        SHiRA,
        "SHIRA",
        {
            "r": PeftField("r", 32),
            "seed": PeftField("random_seed", None, to_ours=lambda seed: 0 if seed is None else seed),
        },
        {"lora_S": PeftTensor("shira_weight"), "lora_places": PeftTensor("shira_indices", Tensor.long, Tensor.int)},
        written={"mask_type": "random"},
    ),
)
