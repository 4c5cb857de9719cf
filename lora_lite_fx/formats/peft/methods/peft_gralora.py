"""GraLoRA in PEFT."""

from ....variants import GraLoRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        GraLoRA,
        "GRALORA",
        {
            "r": PeftField("r", 32),
            "alpha": PeftField("alpha", 64),
            "dropout": PeftField("gralora_dropout", 0.0),
            "k": PeftField("gralora_k", 2),
            "hybrid_r": PeftField("hybrid_r", 0),
        },
        {
            "lora_A": PeftTensor("gralora_A"),
            "lora_B": PeftTensor("gralora_B"),
            "lora_hybrid_A": PeftTensor("gralora_A_general.weight"),
            "lora_hybrid_B": PeftTensor("gralora_B_general.weight"),
        },
        conv1d=True,
    ),
)
