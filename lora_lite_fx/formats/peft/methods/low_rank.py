"""PEFT's formats of the variants with low-rank factors of their own at each site."""

from __future__ import annotations

from torch import Tensor

from ....adapters.variant import Variant
from ....variants import EVA, AdaLoRA, DeLoRA, DoRA, GraLoRA, HiRA, LoRA, MiSS, OLoRA, PiSSA
from ..form import BOTH_PATTERNS, GAUSSIAN, PeftField, PeftFormat, PeftTensor, R, as_patches, as_points, as_rows

_FACTORS = {
    "lora_A": PeftTensor("lora_A.weight", as_rows, embedding="lora_embedding_A", conv=as_patches),
    "lora_B": PeftTensor("lora_B.weight", as_rows, embedding="lora_embedding_B", conv=as_points),
}


_MAGNITUDE = PeftTensor(
    "lora_magnitude_vector", Tensor.flatten, conv=lambda m, kernel: m[(None, slice(None), *[None] * len(kernel))]
)


def _lora(variant: type[Variant], start: object) -> PeftFormat:
    """Return the format of one of the variants that PEFT treats as a LoRA."""
    magnitude = {"lora_m": _MAGNITUDE} if variant is DoRA else {}
    bias = {"lora_bias": PeftTensor("lora_B.bias")} if variant is LoRA else {}
    return PeftFormat(
        variant,
        "LORA",
        {
            **R,
            "alpha": PeftField("lora_alpha", 8),
            "dropout": PeftField("lora_dropout", 0.0),
            "rank_stabilized": PeftField("use_rslora", False),
            **({"bias": PeftField("lora_bias", False)} if variant is LoRA else {}),
        },
        {**_FACTORS, **magnitude, **bias},
        constants={"use_dora": variant is DoRA, "init_lora_weights": start},
        unread=frozenset({"eva_config", "qalora_group_size"}),
        # VeLoRA approximates gradients and computes what LoRA does.
        unread_in_files=frozenset({"lora_ga_config", "corda_config", "velora_config"}),
        ignored=("lora_velora_embed",),
        start="init_lora_weights",
        starts={start: {}, **(GAUSSIAN if start is True else {})},
        patterns=BOTH_PATTERNS,
        conv1d=variant is not OLoRA,
        kinds=("linear", "embedding", "conv") if variant in (LoRA, DoRA) else ("linear",),
        own_conv=True,
        rest=("lora_A0", "lora_B0") if variant in (PiSSA, OLoRA) else (),
    )


def _miss(mode: str, start: object) -> PeftFormat:
    return PeftFormat(
        MiSS,
        "MISS",
        {"r": PeftField("r", 64), "dropout": PeftField("miss_dropout", 0.0), "mini_r": PeftField("mini_r", 1)},
        {"lora_D": PeftTensor("miss_block")},
        fixed={"mode": mode},
        constants={"init_weights": start},
        starts={start: {}},
    )


LOW_RANK = (
    _lora(LoRA, True),
    _lora(DoRA, True),
    _lora(PiSSA, "pissa"),
    _lora(OLoRA, "olora"),
    _lora(EVA, "eva"),
    PeftFormat(
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
        same_rank="lora_A",
        conv1d=True,
        kinds=("linear", "conv"),
        kernels=(2,),
    ),
    PeftFormat(
        DeLoRA,
        "DELORA",
        {
            **R,
            "lambda0": PeftField("delora_lambda", 15.0, to_ours=float),
            "dropout": PeftField("module_dropout", 0.0),
        },
        {
            "lora_A": PeftTensor("delora_A"),
            "lora_B": PeftTensor("delora_B"),
            "lora_lambda": PeftTensor("delora_lambda", to_ours=Tensor.squeeze, to_peft=lambda t: t.reshape(1)),
            "lora_wnorm": PeftTensor("delora_w_norm"),
        },
        patterns=frozenset({"rank_pattern"}),
    ),
    PeftFormat(
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
        same_rank="lora_A",
        conv1d=True,
    ),
    PeftFormat(
        GraLoRA,
        "GRALORA",
        {
            "r": PeftField("r", 32),
            "alpha": PeftField("alpha", 64),
            "dropout": PeftField("gralora_dropout", 0.0),
            "k": PeftField("gralora_k", 2),
            "hybrid_r": PeftField("hybrid_r", 0),
        },
        {
            "lora_A": PeftTensor("gralora_A"),
            "lora_B": PeftTensor("gralora_B"),
            "lora_hybrid_A": PeftTensor("gralora_A_general.weight"),
            "lora_hybrid_B": PeftTensor("gralora_B_general.weight"),
        },
        conv1d=True,
    ),
    *(_miss(mode, start) for mode, start in (("balance", True), ("mini", "mini"), ("bat", "bat"))),
)
