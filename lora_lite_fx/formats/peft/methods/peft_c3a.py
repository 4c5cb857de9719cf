"""C3A in PEFT."""

from ....variants import C3A
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

_STARTS = {True: "zeros", False: "xavier_uniform"}

FORMS = (
    PeftForm(
        C3A,
        "C3A",
        {
            "block_size": PeftField("block_size", 256),
            "init_weights": PeftField(
                "init_weights",
                "xavier_uniform",
                to_ours=lambda start: _STARTS.get(start, start),
                to_peft=lambda start: True if start == "zeros" else start,
            ),
        },
        {"lora_c3a_kernel": PeftTensor("c3a_kernel")},
        start="",
        patterns=frozenset({"block_size_pattern"}),
    ),
)
