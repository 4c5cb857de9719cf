"""HiRA in PEFT, which gives all sites the rank `r`."""

from ....variants import HiRA
from ..fields_and_tensors import GAUSSIAN, PeftField, PeftTensor, as_patches, as_points, as_rows
from ..one_rank import OneRankForm

FORMS = (
    OneRankForm(
        HiRA,
        "HIRA",
        {"r": PeftField("r", 32), "dropout": PeftField("hira_dropout", 0.0)},
        {
            "lora_A": PeftTensor("hira_A", as_rows, embedding="hira_embedding_A", conv=as_patches),
            "lora_B": PeftTensor("hira_B", as_rows, embedding="hira_embedding_B", conv=as_points),
        },
        kinds=("linear", "embedding", "conv"),
        unread=frozenset({"rank_pattern"}),
        starts={True: {}, **GAUSSIAN},
        conv1d=True,
    ),
)
