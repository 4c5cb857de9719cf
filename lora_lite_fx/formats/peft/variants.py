"""Name the config fields and the tensors of each variant in PEFT's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ...adapters.variant import Variant
from ...errors import ConfigError
from ...sites.kinds.convolution import Convolution
from ...sites.site import Site
from ...variants import (
    BOFT,
    C3A,
    EVA,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    DeLoRA,
    DoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    OLoRA,
    PiSSA,
    RandLoRA,
    RoAd,
    SHiRA,
    VBLoRA,
    VeRA,
)


@dataclass(frozen=True)
class PeftField:
    """One field of a config.

    Args:
        name: PEFT's name.
        default: PEFT's value where a file leaves it out.
        to_ours, to_peft: converters of its value.
    """

    name: str
    default: Any
    to_ours: Callable[[Any], Any] = lambda value: value
    to_peft: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of a site.

    Args:
        key: the part after the module's path in PEFT's files; of a tensor that sites share, the whole key.
        to_ours, to_peft: converters of its layout.
        embedding: the key at an embedding, if it is another.
        conv: its layout at a convolution, from ours and the size of the kernel.
    """

    key: str
    to_ours: Callable[[Tensor], Tensor] = lambda tensor: tensor
    to_peft: Callable[[Tensor], Tensor] = lambda tensor: tensor
    embedding: str = ""
    conv: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None

    def key_at(self, kind: str) -> str:
        """Return the key at a site of that kind."""
        return self.embedding if kind == "embedding" and self.embedding else self.key


@dataclass(frozen=True)
class PeftFormat:
    """The form in which PEFT writes a variant.

    Args:
        variant: the variant.
        peft_type: PEFT's name of the method.
        fields: PEFT's fields, by ours.
        tensors: PEFT's tensors, by ours.
        fixed: the values that our other fields must have, because one variant here may be several formats there.
        constants: PEFT's fields that tell these formats apart; a file that leaves one out counts as having this value.
        written: fields of PEFT that it needs in a file, and that are not read.
        unread_in_files: fields that say how an adapter starts or trains, and do not matter to what a file computes.
        ignored: endings of keys of tensors that do not either.
        unread: fields that say only how an adapter starts, or what its other fields make pointless.
        start: PEFT's field that says how a new adapter starts; empty if it is one of `fields`.
        starts: the starts that a new adapter has here too: our fields, by the value of that field.
        from_file: a field, and the tensor whose first side says it better than a file's config: PEFT without CUDA makes
            one factor of BOFT whatever its config says.
        same_rank: the tensor whose first side is the rank, if PEFT gives all sites the rank `r` whatever
            `rank_pattern` says. A file is read by the tensor, and written with the largest rank for all.
        patterns: PEFT's fields that have other values by name, called as here.
        conv1d: whether PEFT has it for `Conv1D`.
        kinds: of the sites that can be read and written.
        kernels: the numbers of dimensions that kernels of convolutions may have.
        own_conv: whether PEFT computes a convolution of its own, of which it does not give all settings over.
        rest: our tensors that a file may lack, as they follow from the weight or the config.
    """

    variant: type[Variant]
    peft_type: str
    fields: Mapping[str, PeftField]
    tensors: Mapping[str, PeftTensor]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    unread_in_files: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    start: str = "init_weights"
    starts: Mapping[Any, Mapping[str, Any]] = field(default_factory=lambda: {True: {}})
    from_file: tuple[str, str] | None = None
    same_rank: str = ""
    patterns: frozenset[str] = frozenset()
    conv1d: bool = False
    kinds: tuple[str, ...] = ("linear",)
    kernels: tuple[int, ...] = (1, 2, 3)
    own_conv: bool = False
    rest: tuple[str, ...] = ()

    def tensor_to_peft(self, variant: Variant, site: Site, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor called `name` in PEFT's layout."""
        if isinstance(variant, IA3):
            if site.kernel:
                return tensor[(None, slice(None), *[None] * len(site.kernel))]
            return tensor[None, :] if variant.gates_input(site) else tensor[:, None]
        theirs = self.tensors[name]
        if isinstance(site.kind, Convolution) and theirs.conv is not None:
            return theirs.conv(tensor, site.kind.kernel)
        return theirs.to_peft(tensor)


_BOTH_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
_R = {"r": PeftField("r", 8)}
_R_ALPHA = {**_R, "alpha": PeftField("alpha", 8)}
_UPDATE_DROPOUT = {
    "rank_dropout": PeftField("rank_dropout", 0.0),
    "module_dropout": PeftField("module_dropout", 0.0),
    "effective_conv": PeftField("use_effective_conv2d", False),
}


def _patches(a: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return `A (r, d_in)` as the weight of a convolution."""
    weight: Tensor = a.unflatten(1, (-1, *kernel))
    return weight


def _points(b: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return `B (d_out, r)` as the weight of a convolution whose kernel is a point."""
    return b[(..., *[None] * len(kernel))]


_rows = partial(Tensor.flatten, start_dim=1)
_FACTORS = {
    "lora_A": PeftTensor("lora_A.weight", _rows, embedding="lora_embedding_A", conv=_patches),
    "lora_B": PeftTensor("lora_B.weight", _rows, embedding="lora_embedding_B", conv=_points),
}
_MAGNITUDE = PeftTensor(
    "lora_magnitude_vector", Tensor.flatten, conv=lambda m, kernel: m[(None, slice(None), *[None] * len(kernel))]
)


_GAUSSIAN = {"gaussian": {"init_weights": "gaussian"}}


def _lora(variant: type[Variant], start: object) -> PeftFormat:
    """Return the format of one of the variants that PEFT treats as a LoRA."""
    magnitude = {"lora_m": _MAGNITUDE} if variant is DoRA else {}
    bias = {"lora_bias": PeftTensor("lora_B.bias")} if variant is LoRA else {}
    return PeftFormat(
        variant,
        "LORA",
        {
            **_R,
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
        starts={start: {}, **(_GAUSSIAN if start is True else {})},
        patterns=_BOTH_PATTERNS,
        conv1d=variant is not OLoRA,
        kinds=("linear", "embedding", "conv") if variant in (LoRA, DoRA) else ("linear",),
        own_conv=True,
        rest=("lora_A0", "lora_B0") if variant in (PiSSA, OLoRA) else (),
    )


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


def _hra(orthogonal: bool) -> PeftFormat:
    return PeftFormat(
        HRA,
        "HRA",
        _R,
        {"lora_U": PeftTensor("hra_u", to_ours=Tensor.t, to_peft=Tensor.t, conv=lambda u, kernel: u.t())},
        fixed={"orthogonal": orthogonal},
        constants={"apply_GS": orthogonal},
        # True draws vectors in equal pairs. Gram-Schmidt makes rounding errors of those, so they are drawn apart here.
        starts={not orthogonal: {}},
        kinds=("linear", "conv"),
        kernels=(2,),
        own_conv=True,
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


_C3A_STARTS = {True: "zeros", False: "xavier_uniform"}

FORMATS = (
    _lora(LoRA, True),
    _lora(DoRA, True),
    _lora(PiSSA, "pissa"),
    _lora(OLoRA, "olora"),
    _lora(EVA, "eva"),
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
        DeLoRA,
        "DELORA",
        {
            **_R,
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
        LoHa,
        "LOHA",
        {**_R_ALPHA, **_UPDATE_DROPOUT},
        {
            "lora_A1": PeftTensor("hada_w1_b"),
            "lora_B1": PeftTensor("hada_w1_a"),
            "lora_A2": PeftTensor("hada_w2_b"),
            "lora_B2": PeftTensor("hada_w2_a"),
            "lora_T1": PeftTensor("hada_t1"),
            "lora_T2": PeftTensor("hada_t2"),
        },
        fixed={"rank_dropout_scale": True},
        patterns=_BOTH_PATTERNS,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(1, 2),
    ),
    PeftFormat(
        LoKr,
        "LOKR",
        {
            **_R_ALPHA,
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
                _rows,
                conv=lambda w, kernel: w.unflatten(1, (-1, *kernel)),
            ),
            "lora_A2": PeftTensor("lokr_w2_b"),
            "lora_B2": PeftTensor("lokr_w2_a"),
            "lora_T2": PeftTensor("lokr_t2"),
        },
        patterns=_BOTH_PATTERNS,
        kinds=("linear", "conv", "grouped_conv"),
        kernels=(1, 2),
    ),
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
    PeftFormat(
        HiRA,
        "HIRA",
        {"r": PeftField("r", 32), "dropout": PeftField("hira_dropout", 0.0)},
        {
            "lora_A": PeftTensor("hira_A", _rows, embedding="hira_embedding_A", conv=_patches),
            "lora_B": PeftTensor("hira_B", _rows, embedding="hira_embedding_B", conv=_points),
        },
        kinds=("linear", "embedding", "conv"),
        unread=frozenset({"rank_pattern"}),
        starts={True: {}, **_GAUSSIAN},
        same_rank="lora_A",
        conv1d=True,
    ),
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
        SHiRA,
        "SHIRA",
        {
            "r": PeftField("r", 32),
            "seed": PeftField("random_seed", None, to_ours=lambda seed: 0 if seed is None else seed),
        },
        {"lora_S": PeftTensor("shira_weight"), "lora_places": PeftTensor("shira_indices", Tensor.long, Tensor.int)},
        written={"mask_type": "random"},
    ),
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
    *(_miss(mode, start) for mode, start in (("balance", True), ("mini", "mini"), ("bat", "bat"))),
)


def format_of(variant: Variant) -> PeftFormat:
    """Return how PEFT writes `variant`.

    Raises:
        ConfigError: PEFT does not have it.
    """
    for form in FORMATS:
        fixed = all(getattr(variant, name, None) == value for name, value in form.fixed.items())
        if form.variant is type(variant) and fixed:
            return form
    raise ConfigError(f"PEFT has no method that computes {type(variant).__name__}.")
