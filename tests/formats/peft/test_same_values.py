"""PEFT as an independent oracle: the same adapter values give the same outputs, gradients, merged weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from lora_lite_fx.adapters.hyperparameters import WithRank
from tests.support.peft_models import CASES, Case
from tests.support.peft_oracles import ALPHA, ORACLES, RANK, TOLERANCE, Pair, make_pair
from tests.support.selection import broad_unless, slow_unless

PAIRS = [(case, name) for case in CASES for name, oracle in ORACLES.items() if case in oracle.cases]
FEW = ("LoRA", "DoRA", "IA3", "OFT")  # of those of the other models


@pytest.fixture(
    scope="module",
    params=broad_unless(lambda it: it[0] == "mlp", slow_unless(lambda it: it[0] == "mlp" or it[1] in FEW, PAIRS)),
    ids=" ".join,
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each variant on each model, at its start values."""
    case, oracle = request.param
    return make_pair(case, ORACLES[oracle])


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Assert equality relative to the largest value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    largest = expected.abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item() / (largest or 1)
    assert error <= tolerance, f"{what}: off by {error:.1e} of {largest:.1e}"


def run(model: nn.Module, case: Case, shape: tuple[int, int]) -> Tensor:
    """The output, after a backward pass from a fixed random functional of it."""
    model.zero_grad()
    y = model(**case.inputs(shape))
    y = y if isinstance(y, Tensor) else y.logits
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * direction).sum().backward()
    return y.detach()


# The tests; those of one pair run in this order.


def test_adapted_sites_are_those_that_peft_adapts(pair: Pair) -> None:
    sites = {name.rpartition(".")[0] for name in llfx.adapter_state_dict(pair.ours) if "." in name}
    assert sites == set(pair.theirs.targeted_module_names)


def test_trainable_parameters_have_the_count_of_peft(pair: Pair) -> None:
    ours = sum(parameter.numel() for parameter in llfx.adapter_parameters(pair.ours))
    # AdaLoRA's is a number of its allocator, which PEFT calls trainable because of the prefix of its name.
    counters = sum("ranknum" in name for name, _ in pair.theirs.named_parameters())
    assert ours == pair.theirs.get_nb_trainable_parameters()[0] - counters


def test_deterministic_start_values_agree(pair: Pair) -> None:
    for site, name, ours, theirs in pair.twins():
        expected = pair.oracle.as_ours(theirs).detach()
        if pair.oracle.from_weight:
            # Up to the sign of the vectors, and to what PEFT loses in single precision.
            close(ours.abs(), expected.abs(), f"start of {site}.{name}", 1e-4)
        elif name not in pair.oracle.drawn:
            in_single = torch.equal(expected, expected.float().double())  # made before the model became double
            close(ours.float() if in_single else ours, expected, f"start of {site}.{name}", 1e-12)


def test_outputs_and_gradients_agree_for_random_values(pair: Pair) -> None:
    pair.randomise()
    for shape in ((3, 6), (2, 4)):
        close(run(pair.ours, pair.case, shape), run(pair.theirs, pair.case, shape), f"output of {shape}")
        for site, name, ours, theirs in pair.twins():
            if ours.requires_grad:
                assert ours.grad is not None
                assert theirs.grad is not None
                assert theirs.grad.abs().max() > 0, f"{site}.{name}: a zero gradient compares nothing"
                close(ours.grad, pair.oracle.as_ours(theirs.grad), f"gradient of {site}.{name}, {shape}")


def test_merged_weights_agree_for_random_values(pair: Pair) -> None:
    pair.randomise()
    merged, expected = llfx.merge(pair.ours), copy.deepcopy(pair.theirs).merge_and_unload()
    adapted = {f"{site}.weight" for site in pair.theirs.targeted_module_names}
    for name, parameter in merged.named_parameters():
        theirs = expected.get_parameter(name)
        path = name.rpartition(".")[0]
        stored_alike = type(pair.model.get_submodule(path)) is type(expected.get_submodule(path))
        close(parameter, theirs if stored_alike else theirs.t(), f"merged {name}")
        if name in adapted:
            base = pair.model.get_parameter(name)
            assert (parameter - base).abs().max() > 0.05 * base.abs().max(), f"{name} has hardly been changed"


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_pissa_start_and_residual_sum_to_the_frozen_weight_as_in_peft(name: str) -> None:
    pair = make_pair(name, ORACLES["PiSSA"])
    s = ALPHA / RANK
    for site in pair.theirs.targeted_module_names:
        ours: Any = pair.ours.get_submodule(site)
        theirs: Any = pair.theirs.get_submodule(f"base_model.model.{site}")
        transposed = isinstance(pair.model.get_submodule(site), Conv1D)
        weight: Tensor = pair.model.get_parameter(f"{site}.weight")
        residual = theirs.base_layer.weight
        weight, residual = (weight.t(), residual.t()) if transposed else (weight, residual)
        start = s * ours.lora_B0 @ ours.lora_A0
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        close(start, s * b @ a, f"{site}: s B0 A0")
        close(weight - start, residual, f"{site}: W - s B0 A0")


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "DeLoRA", "HRA", "HRA orthogonal", "C3A", "LoHa", "GraLoRA", "HiRA"])
def test_random_start_values_are_drawn_as_in_peft(name: str) -> None:
    oracle = ORACLES[name]
    model = nn.Sequential(nn.Linear(300, 200))
    config: Any = oracle.config(target_modules="0")
    config.r = rank = 16
    torch.manual_seed(0)
    ranked = {"r": rank} if issubclass(oracle.cls, WithRank) else {}
    gm = llfx.rewrite(model, oracle.cls(**{**oracle.fields, **ranked}, target_names=("0",)))
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    for drawn in oracle.drawn:
        ours = gm.get_parameter(f"0.{drawn}").detach()
        theirs = oracle.as_ours(reference.get_parameter(f"base_model.model.0.{oracle.tensors[drawn]}")).detach()
        if name == "HRA":
            for start in (ours, theirs):
                assert torch.equal(start[::2], start[1::2]), "vectors come in pairs"
                assert not torch.equal(start[0], start[2]), "pairs differ"
        assert ours.mean().abs() < 0.1 * ours.std()
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
