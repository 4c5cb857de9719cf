"""MiSS in PEFT, whose start says which of three methods it is."""

from __future__ import annotations

from ....variants import MiSS
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm


def _form(mode: str, start: object) -> PeftForm:
    return PeftForm(
        MiSS,
        "MISS",
        {"r": PeftField("r", 64), "dropout": PeftField("miss_dropout", 0.0), "mini_r": PeftField("mini_r", 1)},
        {"lora_D": PeftTensor("miss_block")},
        fixed={"mode": mode},
        constants={"init_weights": start},
        starts={start: {}},
    )


FORMS = (_form("balance", True), _form("mini", "mini"), _form("bat", "bat"))
