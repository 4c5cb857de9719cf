"""PEFT as an independent oracle: its config and tensors for each of our variants, and models with both."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.c3a import layer as c3a_layer
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from lora_lite_fx.passes import Pipeline
from lora_lite_fx.variants.pissa import FromWeight
from tests.support.peft_models import CASES, Case, captured

RANK, ALPHA, LAMBDA = 4, 6, 3
SEED = 5  # of what is drawn and frozen
TOLERANCE = 1e-5

# The variants.


@dataclass(frozen=True)
class Oracle:
    """A variant, its PEFT config, and what PEFT calls its tensors (below the module of the site)."""

    cls: type[llfx.Variant]
    config: Callable[..., peft.PeftConfig]
    tensors: dict[str, str]
    fields: dict[str, Any] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    """Tensors with a random start. Frozen ones get PEFT's values."""
    conv1d: bool = True
    """Whether PEFT has it for `Conv1D`; if not, the reference gets ordinary linears of the same weights."""
    as_ours: Callable[[Tensor], Tensor] = torch.squeeze
    """A view of PEFT's tensor in our shape."""
    cases: tuple[str, ...] = ("mlp", "llama", "gpt2", "bert")
    """The models that it fits."""

    @property
    def from_weight(self) -> bool:
        """Return whether the factors start as a part of the frozen weight, which PEFT replaces by the rest."""
        return issubclass(self.cls, FromWeight)

    @property
    def in_single(self) -> bool:
        """Return whether PEFT makes it of weights in single precision only."""
        return self.from_weight or self.cls is llfx.PSOFT


class BlockDiagonal:
    """Stands in for PEFT's CUDA kernel, without which its BOFT has one factor only."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, grad: Tensor, blocks: Tensor) -> list[Tensor]:
        count, size = blocks.shape[1:3]
        tiles = grad.unflatten(2, (count, size)).unflatten(1, (count, size))
        return [tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


class CircularConvolution(BlockCircularConvolution):
    """PEFT's own but for the gradient of its input, which in PEFT 0.21 is not that of its output."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _, kernel = ctx.saved_tensors
        circulant: Any = get_circulant_fast
        theirs: Any = BlockCircularConvolution
        return grad.to(kernel.dtype) @ circulant(kernel), theirs.backward(ctx, grad)[1]


setattr(boft_layer, "_FBD_CUDA", BlockDiagonal())  # noqa: B010
setattr(c3a_layer, "BlockCircularConvolution", CircularConvolution)  # noqa: B010

ALL = tuple(CASES)
LOW_RANK = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
LORA = functools.partial(peft.LoraConfig, r=RANK, lora_alpha=ALPHA)
SCALED = {"r": RANK, "alpha": ALPHA}
EVEN = ("llama", "gpt2", "bert")  # whose widths blocks and groups divide
GLORA = {"config_A_B": "weight_form", "config_C": "coupling_form", "config_D_E": "bias_form"}
GLORA_FORMS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}, ("mlp", "llama")),
    ({"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, ("mlp",)),
    ({"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}, ("mlp",)),
)
LOKR = {
    "lora_W1": "lokr_w1.default",
    "lora_A1": "lokr_w1_b.default",
    "lora_B1": "lokr_w1_a.default",
    "lora_W2": "lokr_w2.default",
    "lora_A2": "lokr_w2_b.default",
    "lora_B2": "lokr_w2_a.default",
}
ORACLES = {
    "LoRA": Oracle(llfx.LoRA, LORA, LOW_RANK, SCALED, ("lora_A",), cases=ALL),
    "LoRA rank-stabilized": Oracle(
        llfx.LoRA,
        functools.partial(LORA, use_rslora=True),
        LOW_RANK,
        {**SCALED, "rank_stabilized": True},
        ("lora_A",),
    ),
    "LoRA with bias": Oracle(
        llfx.LoRA,
        functools.partial(LORA, lora_bias=True),
        {**LOW_RANK, "lora_bias": "lora_B.default.bias"},
        {**SCALED, "bias": True},
        ("lora_A",),
        cases=("mlp", "gpt2", "bert"),  # PEFT merges a bias only into a bias
    ),
    "PiSSA": Oracle(llfx.PiSSA, functools.partial(LORA, init_lora_weights="pissa"), LOW_RANK, SCALED, cases=ALL),
    "OLoRA": Oracle(llfx.OLoRA, functools.partial(LORA, init_lora_weights="olora"), LOW_RANK, SCALED, conv1d=False),
    "DoRA": Oracle(
        llfx.DoRA,
        functools.partial(LORA, use_dora=True),
        {**LOW_RANK, "lora_m": "lora_magnitude_vector.default.weight"},
        SCALED,
        ("lora_A",),
        cases=ALL,
    ),
    "DeLoRA": Oracle(
        llfx.DeLoRA,
        functools.partial(peft.DeloraConfig, r=RANK, delora_lambda=LAMBDA),
        {
            "lora_A": "delora_A.default",
            "lora_B": "delora_B.default",
            "lora_lambda": "delora_lambda.default",
            "lora_wnorm": "delora_w_norm.default",
        },
        {"r": RANK, "lambda0": float(LAMBDA)},
        ("lora_A",),
        conv1d=False,
    ),
    "HRA": Oracle(
        llfx.HRA,
        functools.partial(peft.HRAConfig, r=RANK),
        {"lora_U": "hra_u.default"},
        {"r": RANK},
        ("lora_U",),
        conv1d=False,
        cases=ALL,
        as_ours=torch.t,
    ),
    "HRA orthogonal": Oracle(
        llfx.HRA,
        # Not its usual start, of pairs: the second vector of each would be rounding errors.
        functools.partial(peft.HRAConfig, r=RANK, apply_GS=True, init_weights=False),
        {"lora_U": "hra_u.default"},
        {"r": RANK, "orthogonal": True},
        ("lora_U",),
        conv1d=False,
        as_ours=torch.t,
    ),
    "IA3": Oracle(llfx.IA3, peft.IA3Config, {"lora_g": "ia3_l.default"}, cases=ALL),
    **{
        f"RoAd {kind}": Oracle(
            llfx.RoAd,
            functools.partial(peft.RoadConfig, variant=kind, group_size=8),
            {"lora_road_theta": "road_theta.default", "lora_road_alpha": "road_alpha.default"},
            {"kind": kind, "group_size": 8},
            conv1d=False,
            cases=EVEN,
        )
        for kind in ("road_1", "road_2", "road_4")
    },
    **{
        name: Oracle(
            llfx.OFT,
            functools.partial(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=neumann),
            {"lora_oft_R": "oft_R.default.weight"},
            {"block_size": 4, "use_cayley_neumann": neumann},
            conv1d=False,
            cases=EVEN if neumann else (*EVEN, "t5"),
        )
        for name, neumann in {"OFT": False, "OFT by Neumann series": True}.items()
    },
    **{
        name: Oracle(
            llfx.BOFT,
            functools.partial(peft.BOFTConfig, boft_block_size=size, boft_n_butterfly_factor=factors),
            {"lora_boft_R": "boft_R.default", "lora_boft_s": "boft_s.default"},
            {"block_size": size, "butterfly_factors": factors},
            conv1d=False,
            as_ours=lambda tensor: tensor.squeeze(1) if tensor.dim() == 2 else tensor,
            cases=EVEN,
        )
        for name, size, factors in (("BOFT", 4, 1), ("BOFT of 3 factors", 2, 3))
    },
    "C3A": Oracle(
        llfx.C3A,
        functools.partial(peft.C3AConfig, block_size=4),
        {"lora_c3a_kernel": "c3a_kernel.default"},
        {"block_size": 4},
        ("lora_c3a_kernel",),
        conv1d=False,
        cases=EVEN,
    ),
    "LoHa": Oracle(
        llfx.LoHa,
        functools.partial(peft.LoHaConfig, r=RANK, alpha=ALPHA),
        {
            "lora_A1": "hada_w1_b.default",
            "lora_B1": "hada_w1_a.default",
            "lora_A2": "hada_w2_b.default",
            "lora_B2": "hada_w2_a.default",
        },
        SCALED,
        ("lora_A1", "lora_B1", "lora_B2"),
        conv1d=False,
    ),
    "VeRA": Oracle(
        llfx.VeRA,
        functools.partial(peft.VeraConfig, r=RANK, projection_prng_key=SEED, d_initial=0.125),
        {
            "lora_ld": "vera_lambda_d.default",
            "lora_lb": "vera_lambda_b.default",
            "lora_shared_vera_A": "vera_A.default",
            "lora_shared_vera_B": "vera_B.default",
        },
        {"r": RANK, "projection_seed": SEED, "d_initial": 0.125},
        cases=ALL,
    ),
    "LoKr": Oracle(
        llfx.LoKr,
        functools.partial(peft.LoKrConfig, r=RANK, alpha=ALPHA),
        LOKR,
        SCALED,
        ("lora_A2", "lora_B2", "lora_W2"),
        conv1d=False,
        as_ours=lambda tensor: tensor,
    ),
    "LoKr of low ranks": Oracle(
        llfx.LoKr,
        functools.partial(peft.LoKrConfig, r=1, alpha=ALPHA, decompose_both=True, decompose_factor=4),
        LOKR,
        {"r": 1, "alpha": ALPHA, "decompose_both": True, "decompose_factor": 4},
        ("lora_A1", "lora_A2", "lora_B2", "lora_W2"),
        conv1d=False,
        as_ours=lambda tensor: tensor,
    ),
    **{
        f"RandLoRA {basis}": Oracle(
            llfx.RandLoRA,
            functools.partial(
                peft.RandLoraConfig,
                r=RANK,
                randlora_alpha=ALPHA,
                projection_prng_key=SEED,
                sparse=basis == "sparse",
                very_sparse=basis == "very_sparse",
            ),
            {
                "lora_lambda": "randlora_lambda.default",
                "lora_gamma": "randlora_gamma.default",
                "lora_shared_randlora_A": "randlora_A.default",
                "lora_shared_randlora_B": "randlora_B.default",
            },
            {**SCALED, "projection_seed": SEED, "basis": basis},
        )
        for basis in ("dense", "sparse", "very_sparse")
    },
    "AdaLoRA": Oracle(
        llfx.AdaLoRA,
        functools.partial(peft.AdaLoraConfig, init_r=RANK, lora_alpha=ALPHA, total_step=1),
        {"lora_A": "lora_A.default", "lora_E": "lora_E.default", "lora_B": "lora_B.default"},
        SCALED,
        ("lora_A", "lora_B"),
        cases=("mlp",),
    ),
    "SHiRA": Oracle(
        llfx.SHiRA,
        functools.partial(peft.ShiraConfig, r=2, random_seed=SEED),
        {"lora_S": "shira_weight.default"},
        {"r": 2, "seed": SEED},
        conv1d=False,
        cases=("mlp",),
    ),
    "VB-LoRA": Oracle(
        llfx.VBLoRA,
        functools.partial(peft.VBLoRAConfig, r=RANK, vector_length=8, num_vectors=6),
        {
            "lora_logits_A": "vblora_logits_A.default",
            "lora_logits_B": "vblora_logits_B.default",
            "lora_shared_vblora_bank": "vblora_vector_bank.default",
        },
        {"r": RANK, "vector_length": 8, "num_vectors": 6},
        ("lora_logits_A", "lora_logits_B", "lora_shared_vblora_bank"),
        cases=("gpt2",),
    ),
    "TinyLoRA": Oracle(
        llfx.TinyLoRA,
        functools.partial(peft.TinyLoraConfig, r=2, u=5, weight_tying=1.0),
        {
            "lora_A": "tinylora_A.default",
            "lora_B": "tinylora_B.default",
            "lora_P": "tinylora_P.default",
            "lora_shared_tinylora_v": "tinylora_v.default.0",
        },
        {"r": 2, "u": 5, "tied": True},
        ("lora_A", "lora_B", "lora_P"),  # singular vectors have the signs of the algorithm
        as_ours=lambda tensor: tensor,
        cases=("mlp", "llama", "gpt2"),
    ),
    "FourierFT": Oracle(
        llfx.FourierFT,
        functools.partial(peft.FourierFTConfig, n_frequency=50, scaling=8.0, random_loc_seed=SEED),
        {"lora_spectrum": "fourierft_spectrum.default"},
        {"n_frequency": 50, "scaling": 8.0, "seed": SEED},
        ("lora_spectrum",),
    ),
    **{
        f"WaveFT {wavelet}": Oracle(
            llfx.WaveFT,
            functools.partial(
                peft.WaveFTConfig, n_frequency=50, scaling=8.0, random_loc_seed=SEED, wavelet_family=wavelet
            ),
            {"lora_spectrum": "waveft_spectrum.default"},
            {"n_frequency": 50, "scaling": 8.0, "seed": SEED, "wavelet": wavelet},
            cases=cases,
        )
        for wavelet, cases in (("db1", ("mlp", "llama", "gpt2")), ("db4", ("mlp",)), ("sym2", ("mlp",)))
    },
    **{
        "GLoRA " + " ".join(theirs.values()): Oracle(
            llfx.GLoRA,
            functools.partial(peft.GloraConfig, r=RANK, **theirs),
            {
                f"lora_{name}{factor}": f"glora_{name}.default.X{factor}"
                for name in "ABCDE"
                for factor in ("", "d", "u")
            },
            {"r": RANK, **{GLORA[name]: form for name, form in theirs.items()}},
            ("lora_Au", "lora_Bu", "lora_Cu"),
            conv1d=False,
            as_ours=lambda tensor: tensor,
            cases=cases,
        )
        for theirs, cases in GLORA_FORMS
    },
    **{
        name: Oracle(
            llfx.PSOFT,
            functools.partial(peft.PsoftConfig, r=RANK, **theirs),
            {
                "lora_A": "_psoft_A_cache.default",
                "lora_B": "_psoft_B_cache.default",
                "lora_R": "psoft_R.default.weight",
                "lora_in": "psoft_R.default.vector_a",
                "lora_out": "psoft_R.default.vector_b",
            },
            {"r": RANK, **ours},
            conv1d=False,
            cases=cases,
        )
        for name, theirs, ours, cases in (
            ("PSOFT", {"psoft_alpha": RANK}, {}, ("mlp", "llama", "gpt2")),
            (
                "PSOFT by Neumann series, symmetric",
                {"psoft_alpha": RANK, "use_cayley_neumann": True, "ab_svd_init": "pissa_init", "psoft_mag_a": False},
                {"use_cayley_neumann": True, "symmetric": True, "scale_in": False},
                ("mlp",),
            ),
            (
                "PSOFT free",
                {"psoft_alpha": RANK, "psoft_orth": False, "psoft_mag_b": False},
                {"orthogonal": False, "scale_out": False},
                ("mlp",),
            ),
        )
    },
    "MiSS": Oracle(
        llfx.MiSS,
        functools.partial(peft.MissConfig, r=RANK),
        {"lora_D": "miss_block.default"},
        {"r": RANK},
        conv1d=False,
    ),
    **{
        f"MiSS {mode}": Oracle(
            llfx.MiSS,
            functools.partial(peft.MissConfig, r=RANK, init_weights=mode, mini_r=8),
            {"lora_D": "miss_block.default"},
            {"r": RANK, "mode": mode, "mini_r": 8},
            conv1d=False,
            cases=EVEN,
        )
        for mode in ("mini", "bat")
    },
    "GraLoRA": Oracle(
        llfx.GraLoRA,
        functools.partial(peft.GraloraConfig, r=RANK, alpha=ALPHA),
        {"lora_A": "gralora_A.default", "lora_B": "gralora_B.default"},
        SCALED,
        ("lora_A",),
        cases=EVEN,
    ),
    "GraLoRA hybrid": Oracle(
        llfx.GraLoRA,
        functools.partial(peft.GraloraConfig, r=RANK, alpha=ALPHA, gralora_k=4, hybrid_r=3),
        {
            "lora_A": "gralora_A.default",
            "lora_B": "gralora_B.default",
            "lora_hybrid_A": "gralora_A_general.default.weight",
            "lora_hybrid_B": "gralora_B_general.default.weight",
        },
        {**SCALED, "k": 4, "hybrid_r": 3},
        ("lora_A", "lora_hybrid_A"),
        cases=EVEN,
    ),
    "HiRA": Oracle(
        llfx.HiRA,
        functools.partial(peft.HiraConfig, r=RANK),
        {"lora_A": "hira_A.default", "lora_B": "hira_B.default"},
        {"r": RANK},
        ("lora_A",),
    ),
}

# Both at once.


@dataclass
class Pair:
    """A graph of ours and a PEFT model with the same adapters at the same sites, each at its start."""

    oracle: Oracle
    case: Case
    model: nn.Module
    ours: fx.GraphModule
    theirs: peft.PeftModel
    size: float = 1
    """Of the values of matrices."""
    factors: dict[str, Tensor] = field(default_factory=dict)
    """What PEFT's PiSSA or OLoRA has taken out of the frozen weights."""

    def __post_init__(self) -> None:
        if self.oracle.from_weight:
            starts = ((f"{site}.{name}0", theirs) for site, name, _, theirs in self.twins())
            self.factors = {name: start.detach().clone() for name, start in starts}

    def twins(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Return each tensor: its site, our name for it, ours, and PEFT's own."""
        state = dict(self.ours.named_parameters()) | dict(self.ours.named_buffers())
        for site in self.theirs.targeted_module_names:
            module = self.theirs.get_submodule(f"base_model.model.{site}")
            reference = dict(module.named_parameters()) | dict(module.named_buffers())
            for name, theirs in self.oracle.tensors.items():
                path = name if name.startswith("lora_shared_") else f"{site}.{name}"
                if path in state or theirs in reference:  # which of its tensors LoKr has depends on the widths
                    yield site, name, state[path], reference[theirs]

    def randomise(self) -> None:
        """Give both the same values, away from the start; frozen tensors keep theirs."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, factor in self.factors.items():
                self.ours.get_buffer(name).copy_(factor)
            for _, name, ours, theirs in self.twins():
                if ours.requires_grad:
                    value = torch.rand(ours.shape, generator=generator, dtype=torch.float64) + 0.2
                    if name == "lora_lambda":
                        value *= 10
                    elif name != "lora_m":
                        value *= torch.randn(ours.shape, generator=generator).sign()
                    ours.copy_(self.size * value if value.dim() > 1 else value)
                    self.oracle.as_ours(theirs).copy_(ours)
                elif name in self.oracle.drawn:
                    ours.copy_(theirs)


def targets_of(name: str, oracle: Oracle) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that say what to adapt, in PEFT's config and in ours."""
    case = CASES[name]
    theirs: dict[str, Any] = {"target_modules": case.every}
    ours: dict[str, Any] = {"target_names": (f"^({case.every})$",)}
    if oracle.cls is llfx.IA3:
        theirs = {"target_modules": case.ia3, "feedforward_modules": case.feedforward}
        # Where attention tells keys from values, our own default targets must come to the same sites.
        ours = {} if name != "mlp" else {"target_names": (f"^({case.ia3})$",)}
    if name == "gpt2" and oracle.conv1d:
        theirs["fan_in_fan_out"] = True
    return theirs, ours


def make_pair(name: str, oracle: Oracle) -> Pair:
    case = CASES[name]
    model, graph = captured(name)
    targets, ours = targets_of(name, oracle)
    torch.manual_seed(1)
    # As written, and not optimized: where a softmax is saturated a gradient is nothing but the order of rounding.
    gm = llfx.optimize(llfx.rewrite(graph, oracle.cls(**oracle.fields, **ours)), Pipeline(()))
    reference = copy.deepcopy(model)
    if not oracle.conv1d:
        use_ordinary_linears(reference)
    reference = reference.float() if oracle.in_single else reference
    theirs = peft.get_peft_model(reference, oracle.config(**targets))
    return Pair(oracle, case, model, gm, theirs.double().eval(), case.size)


def use_ordinary_linears(model: nn.Module) -> None:
    """Replace `Conv1D` modules by linears that compute the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                d_in, d_out = child.weight.shape
                linear = nn.Linear(d_in, d_out, dtype=child.weight.dtype)
                linear.load_state_dict({"weight": child.weight.t(), "bias": child.bias})
                setattr(module, name, linear)
