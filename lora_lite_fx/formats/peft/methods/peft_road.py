"""RoAd in PEFT."""

from ....variants import RoAd
from ..fields_and_tensors import PeftField, PeftTensor
from ..form import PeftForm

FORMS = (
    PeftForm(
        RoAd,
        "ROAD",
        {"kind": PeftField("variant", "road_1"), "group_size": PeftField("group_size", 64)},
        {"lora_road_theta": PeftTensor("road_theta"), "lora_road_alpha": PeftTensor("road_alpha")},
    ),
)
