"""RandLoRA in PEFT."""

from __future__ import annotations

from ....variants import RandLoRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm


def _form(basis: str) -> PeftForm:
    return PeftForm(
        RandLoRA,
        "RANDLORA",
        {
            "r": PeftField("r", 32),
            "alpha": PeftField("randlora_alpha", 640),
            "dropout": PeftField("randlora_dropout", 0.0),
            "projection_seed": PeftField("projection_prng_key", 0),
        },
        {
            "lora_lambda": PeftTensor("randlora_lambda"),
            "lora_gamma": PeftTensor("randlora_gamma"),
            "lora_shared_randlora_A": PeftTensor(
                "randlora_A", to_ours=lambda t: t.squeeze(1), to_peft=lambda t: t[:, None]
            ),
            "lora_shared_randlora_B": PeftTensor("randlora_B"),
        },
        fixed={"basis": basis},
        constants={"sparse": basis == "sparse", "very_sparse": basis == "very_sparse"},
        written={"save_projection": True},
        conv1d=True,
        rest=("lora_shared_randlora_A", "lora_shared_randlora_B"),
    )


FORMS = (_form("dense"), _form("sparse"), _form("very_sparse"))
