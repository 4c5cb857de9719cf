"""LoHa in PEFT."""

from ....variants import LoHa
from ..fields_and_tensors import BOTH_PATTERNS, R_ALPHA, PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        LoHa,
        "LOHA",
        {
            **R_ALPHA,
            "rank_dropout": PeftField("rank_dropout", 0.0),
            "module_dropout": PeftField("module_dropout", 0.0),
            "effective_conv": PeftField("use_effective_conv2d", False),
        },
        {
            "lora_A1": PeftTensor("hada_w1_b"),
            "lora_B1": PeftTensor("hada_w1_a"),
            "lora_A2": PeftTensor("hada_w2_b"),
            "lora_B2": PeftTensor("hada_w2_a"),
            "lora_T1": PeftTensor("hada_t1"),
            "lora_T2": PeftTensor("hada_t2"),
        },
        fixed={"rank_dropout_scale": True},
        trains_otherwise={
            "use_effective_conv2d": "PEFT's gradients of hada_w1_a and hada_w2_a are not those of what it computes"
            " (LoHa at convolutions); here they are"
        },
        patterns=BOTH_PATTERNS,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(1, 2),
    ),
)
