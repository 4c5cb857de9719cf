"""PEFT's formats of the variants that turn or scale the input or output."""

from __future__ import annotations

from torch import Tensor

from ....variants import BOFT, HRA, IA3, OFT, PSOFT, RoAd
from ..form import PeftField, PeftFormat, PeftTensor, R


def _hra(orthogonal: bool) -> PeftFormat:
    return PeftFormat(
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


_PSOFT_STARTS = {"psoft_init": False, "pissa_init": True}
ROTATIONS = (
    PeftFormat(
        IA3,
        "IA3",
        {},
        {"lora_g": PeftTensor("ia3_l", to_ours=Tensor.flatten)},
        start="init_ia3_weights",
        conv1d=True,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(2, 3),
    ),
    *(_hra(orthogonal) for orthogonal in (False, True)),
    PeftFormat(
        RoAd,
        "ROAD",
        {"kind": PeftField("variant", "road_1"), "group_size": PeftField("group_size", 64)},
        {"lora_road_theta": PeftTensor("road_theta"), "lora_road_alpha": PeftTensor("road_alpha")},
    ),
    PeftFormat(
        OFT,
        "OFT",
        {
            "block_size": PeftField("oft_block_size", 32),
            "blocks": PeftField("r", 0),
            "block_share": PeftField("block_share", False),
            "coft": PeftField("coft", False),
            "eps": PeftField("eps", 6e-5, to_ours=float),
            "use_cayley_neumann": PeftField("use_cayley_neumann", True),
        },
        {"lora_oft_R": PeftTensor("oft_R.weight")},
        constants={"num_cayley_neumann_terms": 5},
        unread=frozenset({"module_dropout"}),  # which PEFT's layers make and do not use
    ),
    PeftFormat(
        BOFT,
        "BOFT",
        {
            "block_size": PeftField("boft_block_size", 4),
            "blocks": PeftField("boft_block_num", 0),
            "butterfly_factors": PeftField("boft_n_butterfly_factor", 1),
            "dropout": PeftField("boft_dropout", 0.0),
        },
        {
            "lora_boft_R": PeftTensor("boft_R"),
            "lora_boft_s": PeftTensor(
                "boft_s", Tensor.flatten, lambda t: t[:, None], conv=lambda s, kernel: s[None, :]
            ),
        },
        from_file=("butterfly_factors", "lora_boft_R"),
        kinds=("linear", "conv"),
        kernels=(2,),
        own_conv=True,
    ),
    PeftFormat(
        PSOFT,
        "PSOFT",
        {
            "r": PeftField("r", 32),
            "dropout": PeftField("psoft_dropout", 0.0),
            "orthogonal": PeftField("psoft_orth", True),
            "use_cayley_neumann": PeftField("use_cayley_neumann", False),
            "scale_in": PeftField("psoft_mag_a", True),
            "scale_out": PeftField("psoft_mag_b", True),
            "symmetric": PeftField(
                "ab_svd_init",
                "psoft_init",
                to_ours=lambda start: _PSOFT_STARTS.get(start, start),
                to_peft=lambda symmetric: "pissa_init" if symmetric else "psoft_init",
            ),
        },
        {
            "lora_R": PeftTensor("psoft_R.weight"),
            "lora_in": PeftTensor("psoft_R.vector_a"),
            "lora_out": PeftTensor("psoft_R.vector_b"),
        },
        constants={"psoft_svd": "full", "num_cayley_neumann_terms": 5},
        # The factors have the scale in them, so that it has no effect.
        unread=frozenset({"psoft_alpha", "psoft_svd_lowrank_niter", "random_seed"}),
        rest=("lora_A", "lora_B"),
    ),
)
