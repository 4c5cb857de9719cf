"""PEFT's formats of the variants whose update is a matrix: products, transforms, sparse entries."""

from __future__ import annotations

from torch import Tensor

from ....variants import C3A, FourierFT, GLoRA, LoHa, LoKr, SHiRA, WaveFT
from ..form import BOTH_PATTERNS, R_ALPHA, PeftField, PeftFormat, PeftTensor, R, as_rows

_UPDATE_DROPOUT = {
    "rank_dropout": PeftField("rank_dropout", 0.0),
    "module_dropout": PeftField("module_dropout", 0.0),
    "effective_conv": PeftField("use_effective_conv2d", False),
}


_C3A_STARTS = {True: "zeros", False: "xavier_uniform"}


MATRICES = (
    PeftFormat(
        LoHa,
        "LOHA",
        {**R_ALPHA, **_UPDATE_DROPOUT},
        {
            "lora_A1": PeftTensor("hada_w1_b"),
            "lora_B1": PeftTensor("hada_w1_a"),
            "lora_A2": PeftTensor("hada_w2_b"),
            "lora_B2": PeftTensor("hada_w2_a"),
            "lora_T1": PeftTensor("hada_t1"),
            "lora_T2": PeftTensor("hada_t2"),
        },
        fixed={"rank_dropout_scale": True},
        patterns=BOTH_PATTERNS,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(1, 2),
    ),
    PeftFormat(
        LoKr,
        "LOKR",
        {
            **R_ALPHA,
            **_UPDATE_DROPOUT,
            "rank_dropout_scale": PeftField("rank_dropout_scale", False),
            "decompose_both": PeftField("decompose_both", False),
            "decompose_factor": PeftField("decompose_factor", -1),
        },
        {
            "lora_W1": PeftTensor("lokr_w1"),
            "lora_A1": PeftTensor("lokr_w1_b"),
            "lora_B1": PeftTensor("lokr_w1_a"),
            "lora_W2": PeftTensor(
                "lokr_w2",
                as_rows,
                conv=lambda w, kernel: w.unflatten(1, (-1, *kernel)),
            ),
            "lora_A2": PeftTensor("lokr_w2_b"),
            "lora_B2": PeftTensor("lokr_w2_a"),
            "lora_T2": PeftTensor("lokr_t2"),
        },
        patterns=BOTH_PATTERNS,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(1, 2),
    ),
    PeftFormat(
        C3A,
        "C3A",
        {
            "block_size": PeftField("block_size", 256),
            "init_weights": PeftField(
                "init_weights",
                "xavier_uniform",
                to_ours=lambda start: _C3A_STARTS.get(start, start),
                to_peft=lambda start: True if start == "zeros" else start,
            ),
        },
        {"lora_c3a_kernel": PeftTensor("c3a_kernel")},
        start="",
        patterns=frozenset({"block_size_pattern"}),
    ),
    PeftFormat(
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
        rest=("lora_index",),
    ),
    PeftFormat(
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
        rest=("lora_index", "lora_filter"),
    ),
    PeftFormat(
        GLoRA,
        "GLORA",
        {
            **R,
            "weight_form": PeftField("config_A_B", "lora"),
            "coupling_form": PeftField("config_C", "lora"),
            "bias_form": PeftField("config_D_E", "constant"),
        },
        {
            f"lora_{name}{factor}": PeftTensor(f"glora_{name}.X{factor}")
            for name in "ABCDE"
            for factor in ("", "d", "u")
        },
        ignored=(".zeros",),  # of the forms that are "none"
    ),
    PeftFormat(
        SHiRA,
        "SHIRA",
        {
            "r": PeftField("r", 32),
            "seed": PeftField("random_seed", None, to_ours=lambda seed: 0 if seed is None else seed),
        },
        {"lora_S": PeftTensor("shira_weight"), "lora_places": PeftTensor("shira_indices", Tensor.long, Tensor.int)},
        written={"mask_type": "random"},
    ),
)
