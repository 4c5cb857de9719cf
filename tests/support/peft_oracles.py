"""PEFT as an independent oracle: its config for each of our variants, and a model with both.

Values go from PEFT to us by its files, and gradients too: a file in which they stand in place of the values.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.c3a import layer as c3a_layer
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from lora_lite_fx.variants.pissa import FromWeight
from tests.support.peft_models import CASES
from tests.support.releases import has

RANK, ALPHA, LAMBDA = 4, 6, 3
SEED = 5  # of what is drawn and frozen
TOLERANCE = 1e-5

# The variants.


@dataclass(frozen=True)
class Oracle:
    """A variant and its PEFT config."""

    cls: type[llfx.Variant]
    config: Callable[..., peft.PeftConfig]
    fields: dict[str, Any] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    """Our tensors with a random start."""
    conv1d: bool = True
    """Whether PEFT has it for `Conv1D`; if not, PEFT's model gets ordinary linears of the same weights."""
    cases: tuple[str, ...] = ("mlp", "llama", "gpt2", "bert")
    """The models that it fits."""
    since: str = "0.20"
    """The oldest PEFT that makes it."""

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
LORA = functools.partial(peft.LoraConfig, r=RANK, lora_alpha=ALPHA)
SCALED = {"r": RANK, "alpha": ALPHA}
EVEN = ("llama", "gpt2", "bert")  # whose widths blocks and groups divide
GLORA = {"config_A_B": "weight_form", "config_C": "coupling_form", "config_D_E": "bias_form"}
GLORA_FORMS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}, ("mlp", "llama")),
    ({"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, ("mlp",)),
    ({"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}, ("mlp",)),
)
ORACLES = {
    "LoRA": Oracle(llfx.LoRA, LORA, SCALED, ("lora_A",), cases=ALL),
    "LoRA rank-stabilized": Oracle(
        llfx.LoRA, functools.partial(LORA, use_rslora=True), {**SCALED, "rank_stabilized": True}, ("lora_A",)
    ),
    "LoRA with bias": Oracle(
        llfx.LoRA,
        functools.partial(LORA, lora_bias=True),
        {**SCALED, "bias": True},
        ("lora_A",),
        cases=("mlp", "gpt2", "bert"),  # PEFT merges a bias only into a bias
    ),
    "PiSSA": Oracle(llfx.PiSSA, functools.partial(LORA, init_lora_weights="pissa"), SCALED, cases=ALL),
    "OLoRA": Oracle(llfx.OLoRA, functools.partial(LORA, init_lora_weights="olora"), SCALED, conv1d=False),
    "DoRA": Oracle(llfx.DoRA, functools.partial(LORA, use_dora=True), SCALED, ("lora_A",), cases=ALL),
    "DeLoRA": Oracle(
        llfx.DeLoRA,
        functools.partial(peft.DeloraConfig, r=RANK, delora_lambda=LAMBDA),
        {"r": RANK, "lambda0": float(LAMBDA)},
        ("lora_A",),
        conv1d=False,
    ),
    "HRA": Oracle(
        llfx.HRA, functools.partial(peft.HRAConfig, r=RANK), {"r": RANK}, ("lora_U",), conv1d=False, cases=ALL
    ),
    "HRA orthogonal": Oracle(
        llfx.HRA,
        # Not its usual start, of pairs: the second vector of each would be rounding errors.
        functools.partial(peft.HRAConfig, r=RANK, apply_GS=True, init_weights=False),
        {"r": RANK, "orthogonal": True},
        ("lora_U",),
        conv1d=False,
    ),
    "IA3": Oracle(llfx.IA3, peft.IA3Config, cases=ALL),
    **{
        f"RoAd {kind}": Oracle(
            llfx.RoAd,
            functools.partial(peft.RoadConfig, variant=kind, group_size=8),
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
            {"block_size": size, "butterfly_factors": factors},
            conv1d=False,
            cases=EVEN,
        )
        for name, size, factors in (("BOFT", 4, 1), ("BOFT of 3 factors", 2, 3))
    },
    "C3A": Oracle(
        llfx.C3A,
        functools.partial(peft.C3AConfig, block_size=4),
        {"block_size": 4},
        ("lora_c3a_kernel",),
        conv1d=False,
        cases=EVEN,
    ),
    "LoHa": Oracle(
        llfx.LoHa,
        functools.partial(peft.LoHaConfig, r=RANK, alpha=ALPHA),
        SCALED,
        ("lora_A1", "lora_B1", "lora_B2"),
        conv1d=False,
    ),
    "VeRA": Oracle(
        llfx.VeRA,
        functools.partial(peft.VeraConfig, r=RANK, projection_prng_key=SEED, d_initial=0.125),
        {"r": RANK, "projection_seed": SEED, "d_initial": 0.125},
        cases=ALL,
        since="0.21",  # beside torchao 0.18
    ),
    "LoKr": Oracle(
        llfx.LoKr,
        functools.partial(peft.LoKrConfig, r=RANK, alpha=ALPHA),
        SCALED,
        ("lora_A2", "lora_B2", "lora_W2"),
        conv1d=False,
    ),
    "LoKr of low ranks": Oracle(
        llfx.LoKr,
        functools.partial(peft.LoKrConfig, r=1, alpha=ALPHA, decompose_both=True, decompose_factor=4),
        {"r": 1, "alpha": ALPHA, "decompose_both": True, "decompose_factor": 4},
        ("lora_A1", "lora_A2", "lora_B2", "lora_W2"),
        conv1d=False,
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
            {**SCALED, "projection_seed": SEED, "basis": basis},
        )
        for basis in ("dense", "sparse", "very_sparse")
    },
    "AdaLoRA": Oracle(
        llfx.AdaLoRA,
        functools.partial(peft.AdaLoraConfig, init_r=RANK, lora_alpha=ALPHA, total_step=1),
        SCALED,
        ("lora_A", "lora_B"),
        cases=("mlp",),
    ),
    "SHiRA": Oracle(
        llfx.SHiRA,
        functools.partial(peft.ShiraConfig, r=2, random_seed=SEED),
        {"r": 2, "seed": SEED},
        conv1d=False,
        cases=("mlp",),
    ),
    "VB-LoRA": Oracle(
        llfx.VBLoRA,
        functools.partial(peft.VBLoRAConfig, r=RANK, vector_length=8, num_vectors=6),
        {"r": RANK, "vector_length": 8, "num_vectors": 6},
        ("lora_logits_A", "lora_logits_B", "lora_shared_vblora_bank"),
        cases=("gpt2",),
    ),
    "TinyLoRA": Oracle(
        llfx.TinyLoRA,
        functools.partial(peft.TinyLoraConfig, r=2, u=5, weight_tying=1.0),
        {"r": 2, "u": 5, "tied": True},
        ("lora_A", "lora_B", "lora_P"),  # singular vectors have the signs of the algorithm
        cases=("mlp", "llama", "gpt2"),
    ),
    "FourierFT": Oracle(
        llfx.FourierFT,
        functools.partial(peft.FourierFTConfig, n_frequency=50, scaling=8.0, random_loc_seed=SEED),
        {"n_frequency": 50, "scaling": 8.0, "seed": SEED},
        ("lora_spectrum",),
    ),
    **{
        f"WaveFT {wavelet}": Oracle(
            llfx.WaveFT,
            functools.partial(
                peft.WaveFTConfig, n_frequency=50, scaling=8.0, random_loc_seed=SEED, wavelet_family=wavelet
            ),
            {"n_frequency": 50, "scaling": 8.0, "seed": SEED, "wavelet": wavelet},
            cases=cases,
        )
        for wavelet, cases in (("db1", ("mlp", "llama", "gpt2")), ("db4", ("mlp",)), ("sym2", ("mlp",)))
    },
    **{
        "GLoRA " + " ".join(theirs.values()): Oracle(
            llfx.GLoRA,
            functools.partial(peft.GloraConfig, r=RANK, **theirs),
            {"r": RANK, **{GLORA[name]: form for name, form in theirs.items()}},
            ("lora_Au", "lora_Bu", "lora_Cu"),
            conv1d=False,
            cases=cases,
        )
        for theirs, cases in GLORA_FORMS
    },
    **{
        name: Oracle(
            llfx.PSOFT,
            functools.partial(peft.PsoftConfig, r=RANK, **theirs),
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
    "MiSS": Oracle(llfx.MiSS, functools.partial(peft.MissConfig, r=RANK), {"r": RANK}, conv1d=False),
    **{
        f"MiSS {mode}": Oracle(
            llfx.MiSS,
            functools.partial(peft.MissConfig, r=RANK, init_weights=mode, mini_r=8),
            {"r": RANK, "mode": mode, "mini_r": 8},
            conv1d=False,
            cases=EVEN,
        )
        for mode in ("mini", "bat")
    },
    "GraLoRA": Oracle(
        llfx.GraLoRA, functools.partial(peft.GraloraConfig, r=RANK, alpha=ALPHA), SCALED, ("lora_A",), cases=EVEN
    ),
    "GraLoRA hybrid": Oracle(
        llfx.GraLoRA,
        functools.partial(peft.GraloraConfig, r=RANK, alpha=ALPHA, gralora_k=4, hybrid_r=3),
        {**SCALED, "k": 4, "hybrid_r": 3},
        ("lora_A", "lora_hybrid_A"),
        cases=EVEN,
    ),
    "HiRA": Oracle(llfx.HiRA, functools.partial(peft.HiraConfig, r=RANK), {"r": RANK}, ("lora_A",)),
}

# Both at once.


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


def peft_model(name: str, oracle: Oracle, model: nn.Module) -> Any:
    """Return a copy of a model with PEFT's adapter at its start, in evaluation mode, or skip the test."""
    if not has("peft", oracle.since):
        pytest.skip(f"PEFT makes a {oracle.cls.__name__} since {oracle.since}, and this is {peft.__version__}")
    reference = copy.deepcopy(model)
    if not oracle.conv1d:
        use_ordinary_linears(reference)
    if oracle.in_single and next(reference.parameters()).dtype is torch.float64:
        reference.float()
    torch.manual_seed(1)
    return peft.get_peft_model(reference, oracle.config(**targets_of(name, oracle)[0])).eval()


def randomise(theirs: nn.Module, size: float) -> None:
    """Give what PEFT trains values away from the start; those of matrices are of this size."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # which AdaLoRA counts the ranks in
                value = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.2
                if "delora_lambda" in name:
                    value *= 10
                elif "magnitude" not in name:
                    value *= torch.randn(parameter.shape, generator=generator).sign()
                parameter.copy_(size * value if parameter.squeeze().dim() > 1 else value)


def loaded(theirs: Any, graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with the adapter of a PEFT model, which goes there by a file."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return llfx.load_peft(graph, folder).eval()


def gradients_of(theirs: Any, graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the gradients of a PEFT model by our names, in our layout."""
    with_gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.grad is not None:
                with_gradients.get_parameter(name).copy_(parameter.grad)
    return llfx.adapter_state_dict(loaded(with_gradients, graph))


def use_ordinary_linears(model: nn.Module) -> None:
    """Replace `Conv1D` modules by linears that compute the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                d_in, d_out = child.weight.shape
                linear = nn.Linear(d_in, d_out, dtype=child.weight.dtype)
                linear.load_state_dict({"weight": child.weight.t(), "bias": child.bias})
                setattr(module, name, linear)
