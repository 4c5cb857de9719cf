"""VeRA in PEFT."""

from ....variants import VeRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        VeRA,
        "VERA",
        {
            "r": PeftField("r", 256),
            "dropout": PeftField("vera_dropout", 0.0),
            "projection_seed": PeftField("projection_prng_key", 0),
            "d_initial": PeftField("d_initial", 0.1),
        },
        {
            "lora_ld": PeftTensor("vera_lambda_d"),
            "lora_lb": PeftTensor("vera_lambda_b"),
            "lora_shared_vera_A": PeftTensor("vera_A"),
            "lora_shared_vera_B": PeftTensor("vera_B"),
        },
        written={"save_projection": True},
        conv1d=True,
        rest=("lora_shared_vera_A", "lora_shared_vera_B"),
    ),
)
