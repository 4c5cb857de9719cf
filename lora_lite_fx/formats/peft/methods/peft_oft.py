"""OFT in PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ....adapters.variant import Variant
from ....sites.kinds.convolution import Convolution
from ....sites.matching import Call
from ....sites.site import Site
from ....variants import OFT
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm


class _OFT(PeftForm):
    def reasons_against(self, variant: Variant, site: Site) -> Iterator[str]:
        kind = site.kind
        if not isinstance(kind, Convolution):
            yield from super().reasons_against(variant, site)
        elif not all(_is_one_patch(kind, call) for call in site.calls):
            yield "turns patches and adds up their overlaps, which no weight computes"


def _is_one_patch(kind: Convolution, call: Call) -> bool:
    """Return whether no two patches of a convolution overlap, because there is one, or each is a point."""
    if set(kind.kernel) == {1}:
        return True
    value = call.x.meta.get("val")
    sizes = tuple(value.shape[-len(kind.kernel) :]) if isinstance(value, Tensor) else ()
    fixed = all(type(size) is int for size in sizes)
    return len(kind.kernel) == 2 and set(kind.padding) == {0} and fixed and sizes == kind.kernel


FORMS = (
    _OFT(
        OFT,
        "OFT",
        {
            "block_size": PeftField("oft_block_size", 32),
            "blocks": PeftField("r", 0),
            "block_share": PeftField("block_share", False),
            "coft": PeftField("coft", False),
            "eps": PeftField("eps", 6e-5, to_ours=float),
            "use_cayley_neumann": PeftField("use_cayley_neumann", True),
        },
        {"lora_oft_R": PeftTensor("oft_R.weight")},
        constants={"num_cayley_neumann_terms": 5},
        trains_otherwise={
            "coft": "PEFT cuts the trained values themselves in each call, and here a call cuts what it reads"
        },
        unread=frozenset({"module_dropout"}),  # which PEFT's layers make and do not use
    ),
)
