"""Variants against their formulas in NumPy: outputs and gradients of `rewrite` and `wrap`, dropout by its mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx import variants
from lora_lite_fx.testing.comparisons import perturb
from tests.support.captured import captured
from tests.support.selection import broad_after, broad_unless
from tests.variants.formula_parts import Array, Given, names_of
from tests.variants.numpy_formulas import FORMULAS

D_IN, D_OUT = 8, 12  # of which no side is the other's, so that no transposition is hidden
TOKENS = 7
RATE = 0.4
AT: dict[str, Any] = {"target_names": "0"}


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(D_IN, D_OUT)).double()


def upwards() -> nn.Module:
    return nn.Sequential(nn.Linear(D_OUT, D_IN)).double()


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(TOKENS, D_OUT)).double()


X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WIDE = torch.randn(5, D_OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
IDS = torch.tensor([[3, 1, 6, 3, 0]])
R: dict[str, Any] = {"r": 4, **AT}
GLORA = [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none")]
GAINS = (llfx.AntiPaSTOGain, llfx.AntiPaSTOArrow, llfx.AntiPaSTODPLR)

LINEAR: list[llfx.Variant] = [
    llfx.LoRA(alpha=6.0, **R),
    llfx.LoRA(alpha=6.0, rank_stabilized=True, bias=True, **R),
    llfx.PiSSA(alpha=6.0, **R),
    llfx.OLoRA(alpha=6.0, **R),
    llfx.DoRA(alpha=6.0, **R),
    llfx.EVA(alpha=6.0, **R),
    llfx.DeLoRA(**R),
    llfx.AdaLoRA(alpha=6.0, **R),
    llfx.LoRAXS(alpha=6.0, **R),
    llfx.TinyLoRA(u=3, **R),
    llfx.TinyLoRA(u=3, tied=True, **R),
    llfx.VeRA(**R),
    llfx.RandLoRA(alpha=6.0, r=3, **AT),
    llfx.VBLoRA(r=3, num_vectors=5, vector_length=4, **AT),
    llfx.GraLoRA(alpha=6.0, **R),
    llfx.GraLoRA(alpha=6.0, hybrid_r=2, **R),
    llfx.MiSS(r=3, **AT),
    llfx.MiSS(mode="mini", mini_r=3, **R),
    llfx.MiSS(mode="bat", **R),
    llfx.HiRA(**R),
    llfx.LoHa(alpha=6.0, r=2, **AT),
    llfx.LoHa(alpha=6.0, r=1, **AT),
    llfx.LoKr(alpha=6.0, r=1, decompose_both=True, **AT),
    llfx.LoKr(alpha=6.0, r=4, decompose_factor=4, **AT),
    llfx.SHiRA(r=1, **AT),
    llfx.FourierFT(n_frequency=20, **AT),
    llfx.WaveFT(n_frequency=30, **AT),
    llfx.WaveFT(n_frequency=30, wavelet="db2", **AT),
    llfx.WaveFT(n_frequency=30, use_idwt=False, **AT),
    llfx.C3A(block_size=4, **AT),
    *(llfx.GLoRA(weight_form=a, coupling_form=c, bias_form=d, **R) for a, c, d in GLORA),  # type: ignore[arg-type]
    llfx.HRA(**R),
    llfx.HRA(r=3, orthogonal=True, **AT),
    llfx.OFT(block_size=4, **AT),
    llfx.OFT(blocks=4, use_cayley_neumann=False, **AT),
    llfx.OFT(block_size=4, block_share=True, coft=True, eps=0.3, **AT),
    llfx.BOFT(block_size=4, **AT),
    llfx.BOFT(block_size=2, butterfly_factors=3, **AT),
    llfx.IA3(**AT),
    llfx.IA3(feedforward_names="0", **AT),
    *(llfx.RoAd(kind=kind, group_size=4, **AT) for kind in ("road_1", "road_2", "road_4")),
    llfx.PSOFT(**R),
    llfx.PSOFT(use_cayley_neumann=True, scale_in=False, symmetric=True, **R),
    llfx.PSOFT(orthogonal=False, scale_out=False, **R),
    *(llfx.AntiPaSTO(rotate_basis=basis, **R) for basis in ("V", "U", "none")),
    *(cls(suppress_only=only, **R) for cls in GAINS for only in (False, True)),
    llfx.AntiPaSTOArrow(block_size=2, coefficient=0.7, **R),
    llfx.AntiPaSTOAblate(directions=2, coefficient=0.7, **R),
    llfx.Full(**AT),
    llfx.Full(weight=False, **AT),
    llfx.TrainableTokens(token_indices=(1, 7), target_kinds="linear", **AT),
]
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, llfx.Variant]] = {
    **{f"{type(cfg).__name__}-{i}": (linear, X, cfg) for i, cfg in enumerate(LINEAR)},
    "RandLoRA-up": (upwards, WIDE, llfx.RandLoRA(alpha=6.0, r=3, **AT)),
    "VeRA-up": (upwards, WIDE, llfx.VeRA(**R)),
    "TrainableTokens-ids": (embedding, IDS, llfx.TrainableTokens(token_indices=(1, 6), **AT)),
}


def adapted(build: Any, x: Tensor, cfg: llfx.Variant | list[llfx.Variant]) -> tuple[fx.GraphModule, nn.Module]:
    """Return a model adapted by `rewrite` and by `wrap`, with the same values, all parameters trained."""
    model, graph = captured(build, inputs=(x,))
    needs_data = isinstance(cfg, llfx.EVA)
    data = [(torch.cat([x, x.roll(1, 1)]),)] if needs_data else None
    torch.manual_seed(0)
    gm, wrapped = llfx.rewrite(graph, cfg, calibration=data), llfx.wrap(graph, cfg, calibration=data)
    del model  # which the graph knows as long as it exists
    perturb(gm, 1)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    for each in (gm, wrapped):
        each.requires_grad_(True)
    return gm, wrapped


def given(gm: fx.GraphModule, x: Tensor, cfg: llfx.Variant, suffix: str = "") -> Given:
    """Return what the formula of the adapter of `gm` is computed of."""
    tensors = {
        name.rpartition(".")[2].removesuffix(suffix): tensor.numpy()
        for name, tensor in llfx.adapter_state_dict(gm).items()
        if name.endswith(suffix)
    }
    layer: Any = gm.get_submodule("0")
    weight = layer.weight.detach().numpy()
    if not x.is_floating_point():
        return Given(np.eye(TOKENS)[x.flatten()], weight.T, np.zeros(D_OUT), names_of(tensors), cfg)
    return Given(x.numpy(), weight, layer.bias.detach().numpy(), names_of(tensors), cfg)


def agree(actual: Tensor, expected: Array, what: str, tolerance: float = 1e-11) -> None:
    values = actual.detach().numpy().reshape(expected.shape)
    error = np.abs(values - expected).max() / max(1.0, np.abs(expected).max())
    assert error < tolerance, f"{what}: off by {error:.2g}"


FIRST = {type(cfg).__name__: name for name, (_, _, cfg) in reversed(CASES.items())}.values()
"""The first case of each variant."""


@pytest.mark.parametrize("name", broad_unless(lambda name: name in FIRST, CASES))
def test_outputs_and_gradients_are_those_of_the_formula(name: str) -> None:
    build, x, cfg = CASES[name]
    formula = FORMULAS[type(cfg).__name__]
    gm, wrapped = adapted(build, x, cfg)
    known = given(gm, x, cfg)
    direction = np.random.default_rng(3).standard_normal(formula(known).shape)
    for way, run in (("rewrite", fx.Interpreter(gm).run), ("wrap", wrapped)):
        y = run(x)
        agree(y, formula(known), f"{way}: output")
        (y * torch.from_numpy(direction).view_as(y)).sum().backward()
        for path, parameter in (gm if way == "rewrite" else wrapped).named_parameters():
            expected, actual = _slopes(formula, known, path.rpartition(".")[2], parameter.grad, direction, build)
            assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6), f"{way}: gradient of {path}"


def _slopes(
    formula: Callable[[Given], Array], known: Given, name: str, grad: Tensor | None, direction: Array, build: Any
) -> tuple[float, float]:
    """Return how fast the output grows if a tensor moves at random: by finite differences, and by its gradient."""
    at = {"weight": "W", "bias": "b"}.get(name)
    own = names_of({name: np.zeros(())})
    (key,) = vars(own)
    tensor = getattr(known, at) if at else getattr(known.p, key)
    moves = np.random.default_rng(4).standard_normal(tensor.shape)

    def output(step: float) -> float:
        moved = tensor + step * moves
        there = {at: moved} if at else {"p": type(known.p)(**{**vars(known.p), key: moved})}
        return float((formula(replace(known, constants=known, **there)) * direction).sum())

    slope = 0.0
    if grad is not None:
        values = grad.numpy().T if at == "W" and build is embedding else grad.numpy()
        slope = float((values * moves).sum())
    return (output(1e-5) - output(-1e-5)) / 2e-5, slope


DROPPING: list[llfx.Variant] = [
    replace(cast(Any, cfg), dropout=RATE)
    for cfg in LINEAR
    if hasattr(cfg, "dropout") and not isinstance(cfg, llfx.BOFT)
]


@pytest.mark.parametrize(
    "cfg", broad_unless(lambda cfg: type(cfg) in (llfx.LoRA, llfx.DoRA), DROPPING), ids=lambda cfg: type(cfg).__name__
)
def test_dropout_of_the_input_is_its_mask_in_the_formula(cfg: llfx.Variant) -> None:
    torch.manual_seed(5)
    kept = F.dropout(torch.ones_like(X), RATE, True).numpy()
    _check_mask(cfg, *adapted(linear, X, cfg), kept, seed=5)


@pytest.mark.parametrize("scaled", broad_after(1, [True, False]))
@pytest.mark.parametrize("cls", [llfx.LoHa, llfx.LoKr])
def test_dropout_of_an_update_is_its_mask_in_the_formula(cls: Any, scaled: bool) -> None:
    cfg = cls(r=2, rank_dropout=RATE, rank_dropout_scale=scaled, module_dropout=RATE, **AT)
    models = adapted(linear, X, cfg)
    seen = set()
    for seed in (5, 6, 7, 8):
        torch.manual_seed(seed)
        rows = (F.dropout(torch.ones(D_OUT, dtype=torch.float64), RATE, True) > 0).double().numpy()
        all_of_it = float(F.dropout(torch.ones((), dtype=torch.float64), RATE, True) > 0)
        seen.add(all_of_it)
        _check_mask(cfg, *models, (rows / rows.mean() if scaled else rows, all_of_it), seed)
    assert seen == {0.0, 1.0}


def test_dropout_of_blocks_is_its_mask_in_the_formula() -> None:
    cfg = llfx.BOFT(block_size=2, butterfly_factors=3, dropout=RATE, **AT)
    torch.manual_seed(5)
    kept = F.dropout(torch.ones(3, D_IN // 2, 1, 1, dtype=torch.float64), RATE, True)[..., 0, 0].numpy() > 0
    assert 0 < kept.sum() < kept.size
    _check_mask(cfg, *adapted(linear, X, cfg), kept, seed=5)


def _check_mask(cfg: llfx.Variant, gm: fx.GraphModule, wrapped: nn.Module, kept: Any, seed: int) -> None:
    formula, known = FORMULAS[type(cfg).__name__], given(gm, X, cfg)
    for way, model, run in (("rewrite", gm, fx.Interpreter(gm).run), ("wrap", wrapped, wrapped)):
        model.eval()
        agree(run(X), formula(known), f"{way} in evaluation")
        model.train()
        torch.manual_seed(seed)
        agree(run(X), formula(replace(known, kept=kept)), f"{way} in training")


def test_every_variant_has_a_formula_and_a_case() -> None:
    shipped = {
        name
        for name, cls in vars(variants).items()
        if inspect.isclass(cls) and issubclass(cls, llfx.Variant) and name in llfx.registry()
    }
    assert len(shipped) >= 35
    assert set(FORMULAS) == shipped
    assert {type(cfg).__name__ for _, _, cfg in CASES.values()} == shipped
    droppable = {
        name for name in shipped if {"dropout", "rank_dropout"} & set(llfx.registry()[name].__dataclass_fields__)
    }
    assert {type(cfg).__name__ for cfg in DROPPING} | {"BOFT", "LoHa", "LoKr"} == droppable
