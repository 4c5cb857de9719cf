"""AdaLoRA in PEFT, which gives all sites the rank `init_r` and prunes it."""

from torch import Tensor

from ....variants import AdaLoRA
from ..fields_and_tensors import PeftField, PeftTensor
from ..one_rank import OneRankForm

FORMS = (
    OneRankForm(
        AdaLoRA,
        "ADALORA",
        {
            "r": PeftField("init_r", 12),
            "alpha": PeftField("lora_alpha", 8),
            "dropout": PeftField("lora_dropout", 0.0),
        },
        {
            "lora_A": PeftTensor("lora_A"),
            "lora_E": PeftTensor("lora_E", Tensor.flatten, lambda e: e[:, None]),
            "lora_B": PeftTensor("lora_B"),
        },
        written={"total_step": 1},
        unread=frozenset({"r", "target_r", "rank_pattern", "qalora_group_size", "orth_reg_weight"})
        | {"tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"},
        start="init_lora_weights",
        conv1d=True,
        kinds=("linear", "conv"),
        kernels=(2,),
    ),
)
