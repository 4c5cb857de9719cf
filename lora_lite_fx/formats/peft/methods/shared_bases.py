"""PEFT's formats of the variants with tensors that all sites share."""

from __future__ import annotations

from ....variants import RandLoRA, TinyLoRA, VBLoRA, VeRA
from ..form import PeftField, PeftFormat, PeftTensor


def _randlora(basis: str) -> PeftFormat:
    return PeftFormat(
        RandLoRA,
        "RANDLORA",
        {
            "r": PeftField("r", 32),
            "alpha": PeftField("randlora_alpha", 640),
            "dropout": PeftField("randlora_dropout", 0.0),
            "projection_seed": PeftField("projection_prng_key", 0),
        },
        {
            "lora_lambda": PeftTensor("randlora_lambda"),
            "lora_gamma": PeftTensor("randlora_gamma"),
            "lora_shared_randlora_A": PeftTensor(
                "randlora_A", to_ours=lambda t: t.squeeze(1), to_peft=lambda t: t[:, None]
            ),
            "lora_shared_randlora_B": PeftTensor("randlora_B"),
        },
        fixed={"basis": basis},
        constants={"sparse": basis == "sparse", "very_sparse": basis == "very_sparse"},
        written={"save_projection": True},
        conv1d=True,
        rest=("lora_shared_randlora_A", "lora_shared_randlora_B"),
    )


def _tinylora(tied: bool) -> PeftFormat:
    # Of a file whose modules have vectors of their own, `tinylora.py` finds out which are whose.
    vector = {"lora_shared_tinylora_v": PeftTensor("tinylora_v.0")} if tied else {"lora_v": PeftTensor("tinylora_v")}
    return PeftFormat(
        TinyLoRA,
        "TINYLORA",
        {
            "r": PeftField("r", 2),
            "u": PeftField("u", 64),
            "dropout": PeftField("tinylora_dropout", 0.0),
            "projection_seed": PeftField("projection_seed", 42),
        },
        {
            "lora_A": PeftTensor("tinylora_A"),
            "lora_B": PeftTensor("tinylora_B"),
            "lora_P": PeftTensor("tinylora_P"),
            **vector,
        },
        fixed={"tied": tied},
        constants={"weight_tying": float(tied)},
        written={"save_projection": True},
        unread=frozenset({"init_v_bound"}),
        conv1d=True,
    )


SHARED_BASES = (
    PeftFormat(
        VeRA,
        "VERA",
        {
            "r": PeftField("r", 256),
            "dropout": PeftField("vera_dropout", 0.0),
            "projection_seed": PeftField("projection_prng_key", 0),
            "d_initial": PeftField("d_initial", 0.1),
        },
        {
            "lora_ld": PeftTensor("vera_lambda_d"),
            "lora_lb": PeftTensor("vera_lambda_b"),
            "lora_shared_vera_A": PeftTensor("vera_A"),
            "lora_shared_vera_B": PeftTensor("vera_B"),
        },
        written={"save_projection": True},
        conv1d=True,
        rest=("lora_shared_vera_A", "lora_shared_vera_B"),
    ),
    *(_randlora(basis) for basis in ("dense", "sparse", "very_sparse")),
    *(_tinylora(tied) for tied in (False, True)),
    PeftFormat(
        VBLoRA,
        "VBLORA",
        {
            "r": PeftField("r", 4),
            "dropout": PeftField("vblora_dropout", 0.0),
            "num_vectors": PeftField("num_vectors", 256),
            "vector_length": PeftField("vector_length", 256),
            "topk": PeftField("topk", 2),
        },
        {
            "lora_logits_A": PeftTensor("vblora_logits_A"),
            "lora_logits_B": PeftTensor("vblora_logits_B"),
            "lora_shared_vblora_bank": PeftTensor("vblora_vector_bank"),
        },
        unread=frozenset({"init_vector_bank_bound", "init_logits_std"}),
        start="",
        conv1d=True,
    ),
)
