"""PSOFT in PEFT, whose files lack the frozen factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ....adapters.param_spec import AdapterTensors
from ....adapters.placement import Placement
from ....adapters.variant import Variant
from ....errors import ConfigError
from ....variants import PSOFT
from ...single_adapter import sites_of, weight_of
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

_STARTS = {"psoft_init": False, "pissa_init": True}


class _PSOFT(PeftForm):
    def as_written(
        self, model: nn.Module, variant: Variant, placed: Sequence[Placement], state: Mapping[str, Tensor]
    ) -> tuple[Variant, Mapping[str, Tensor]]:
        """Check that PEFT gets the frozen factors from the base.

        Singular vectors have the signs that the algorithm gives them, which another device or library may choose
        otherwise.
        """
        sites = sites_of(model)
        for placement in placed:
            site = sites[placement.site]
            ours = {name: state[placement.tensors[name]] for name in ("lora_A", "lora_B")}
            theirs = {name: torch.empty_like(tensor) for name, tensor in ours.items()}
            placement.local.init(site, weight_of(model, site).detach().float(), AdapterTensors(theirs))
            if not all(torch.allclose(ours[name], theirs[name].to(ours[name]), atol=1e-3) for name in ours):
                raise ConfigError(
                    f"PSOFT: PEFT computes the frozen factors anew from the base. At {placement.site!r} they are"
                    " others here than those of this adapter, which was made on another device, or for another base."
                )
        return variant, state


FORMS = (
    _PSOFT(
        PSOFT,
        "PSOFT",
        {
            "r": PeftField("r", 32),
            "dropout": PeftField("psoft_dropout", 0.0),
            "orthogonal": PeftField("psoft_orth", True),
            "use_cayley_neumann": PeftField("use_cayley_neumann", False),
            "scale_in": PeftField("psoft_mag_a", True),
            "scale_out": PeftField("psoft_mag_b", True),
            "symmetric": PeftField(
                "ab_svd_init",
                "psoft_init",
                to_ours=lambda start: _STARTS.get(start, start),
                to_peft=lambda symmetric: "pissa_init" if symmetric else "psoft_init",
            ),
        },
        {
            "lora_R": PeftTensor("psoft_R.weight"),
            "lora_in": PeftTensor("psoft_R.vector_a"),
            "lora_out": PeftTensor("psoft_R.vector_b"),
        },
        constants={"psoft_svd": "full", "num_cayley_neumann_terms": 5},
        # The factors have the scale in them, so that it has no effect.
        unread=frozenset({"psoft_alpha", "psoft_svd_lowrank_niter", "random_seed"}),
        rest=("lora_A", "lora_B"),
    ),
)
