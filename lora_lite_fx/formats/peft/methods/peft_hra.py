"""HRA in PEFT."""

from __future__ import annotations

from torch import Tensor

from ....variants import HRA
from ..fields_and_tensors import PeftTensor, R
from ..form import PeftForm


def _form(orthogonal: bool) -> PeftForm:
    return PeftForm(
        HRA,
        "HRA",
        R,
        {"lora_U": PeftTensor("hra_u", to_ours=Tensor.t, to_peft=Tensor.t, conv=lambda u, kernel: u.t())},
        fixed={"orthogonal": orthogonal},
        constants={"apply_GS": orthogonal},
        # True draws vectors in equal pairs. Gram-Schmidt makes rounding errors of those, so they are drawn apart here.
        starts={not orthogonal: {}},
        kinds=("linear", "conv"),
        kernels=(2,),
        own_conv=True,
    )


FORMS = (_form(orthogonal=False), _form(orthogonal=True))
