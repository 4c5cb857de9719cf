"""FourierFT in PEFT."""

from ....variants import FourierFT
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        FourierFT,
        "FOURIERFT",
        {
            "n_frequency": PeftField("n_frequency", 1000),
            "scaling": PeftField("scaling", 150.0, to_ours=float),
            "seed": PeftField("random_loc_seed", 777),
            "spectrum": PeftField(
                "init_weights",
                False,
                to_ours=lambda zeros: "zeros" if zeros else "normal",
                to_peft=lambda spectrum: spectrum == "zeros",
            ),
        },
        {"lora_spectrum": PeftTensor("fourierft_spectrum")},
        start="",
        patterns=frozenset({"n_frequency_pattern"}),
        conv1d=True,
        counted="n_frequency",
        rest=("lora_index",),
    ),
)
