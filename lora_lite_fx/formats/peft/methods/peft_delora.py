"""DeLoRA in PEFT."""

from torch import Tensor

from ....variants import DeLoRA
from ..fields_and_tensors import PeftField, PeftTensor, R
from ..form import PeftForm

FORMS = (
    PeftForm(
        DeLoRA,
        "DELORA",
        {
            **R,
            "lambda0": PeftField("delora_lambda", 15.0, to_ours=float),
            "dropout": PeftField("module_dropout", 0.0),
        },
        {
            "lora_A": PeftTensor("delora_A"),
            "lora_B": PeftTensor("delora_B"),
            "lora_lambda": PeftTensor("delora_lambda", to_ours=Tensor.squeeze, to_peft=lambda t: t.reshape(1)),
            "lora_wnorm": PeftTensor("delora_w_norm"),
        },
        patterns=frozenset({"rank_pattern"}),
    ),
)
