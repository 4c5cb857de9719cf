"""WaveFT in PEFT."""

from ....variants import WaveFT
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        WaveFT,
        "WAVEFT",
        {
            "n_frequency": PeftField("n_frequency", 2592),
            "scaling": PeftField("scaling", 25.0, to_ours=float),
            "wavelet": PeftField("wavelet_family", "db1"),
            "use_idwt": PeftField("use_idwt", True),
            "seed": PeftField("random_loc_seed", 777),
        },
        {"lora_spectrum": PeftTensor("waveft_spectrum")},
        patterns=frozenset({"n_frequency_pattern"}),
        conv1d=True,
        counted="n_frequency",
        rest=("lora_index", "lora_filter"),
    ),
)
