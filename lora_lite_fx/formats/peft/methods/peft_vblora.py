"""VB-LoRA in PEFT."""

from ....variants import VBLoRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        VBLoRA,
        "VBLORA",
        {
            "r": PeftField("r", 4),
            "dropout": PeftField("vblora_dropout", 0.0),
            "num_vectors": PeftField("num_vectors", 256),
            "vector_length": PeftField("vector_length", 256),
            "topk": PeftField("topk", 2),
        },
        {
            "lora_logits_A": PeftTensor("vblora_logits_A"),
            "lora_logits_B": PeftTensor("vblora_logits_B"),
            "lora_shared_vblora_bank": PeftTensor("vblora_vector_bank"),
        },
        unread=frozenset({"init_vector_bank_bound", "init_logits_std"}),
        start="",
        conv1d=True,
    ),
)
