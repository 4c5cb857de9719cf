"""LoKr in PEFT."""

from ....variants import LoKr
from ..fields_and_tensors import BOTH_PATTERNS, R_ALPHA, PeftField, PeftTensor, as_rows
from ..form import PeftForm

FORMS = (
    PeftForm(
        LoKr,
        "LOKR",
        {
            **R_ALPHA,
            "rank_dropout": PeftField("rank_dropout", 0.0),
            "module_dropout": PeftField("module_dropout", 0.0),
            "effective_conv": PeftField("use_effective_conv2d", False),
            "rank_dropout_scale": PeftField("rank_dropout_scale", False),
            "decompose_both": PeftField("decompose_both", False),
            "decompose_factor": PeftField("decompose_factor", -1),
        },
        {
            "lora_W1": PeftTensor("lokr_w1"),
            "lora_A1": PeftTensor("lokr_w1_b"),
            "lora_B1": PeftTensor("lokr_w1_a"),
            "lora_W2": PeftTensor(
                "lokr_w2",
                as_rows,
                conv=lambda w, kernel: w.unflatten(1, (-1, *kernel)),
            ),
            "lora_A2": PeftTensor("lokr_w2_b"),
            "lora_B2": PeftTensor("lokr_w2_a"),
            "lora_T2": PeftTensor("lokr_t2"),
        },
        patterns=BOTH_PATTERNS,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(1, 2),
    ),
)
