"""GLoRA in PEFT."""

from ....variants import GLoRA
from ..fields_and_tensors import PeftField, PeftTensor, R
from ..form import PeftForm

FORMS = (
    PeftForm(
        GLoRA,
        "GLORA",
        {
            **R,
            "weight_form": PeftField("config_A_B", "lora"),
            "coupling_form": PeftField("config_C", "lora"),
            "bias_form": PeftField("config_D_E", "constant"),
        },
        {
            f"lora_{name}{factor}": PeftTensor(f"glora_{name}.X{factor}")
            for name in "ABCDE"
            for factor in ("", "d", "u")
        },
        ignored=(".zeros",),  # of the forms that are "none"
    ),
)
