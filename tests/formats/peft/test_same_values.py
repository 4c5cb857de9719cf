"""PEFT as an independent oracle: the same values give the same outputs, gradients and merged weights, both ways."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from lora_lite_fx.adapters.hyperparameters import WithRank
from lora_lite_fx.adapters.placement import by_config
from lora_lite_fx.passes import Pipeline
from tests.support.peft_models import CASES, Case, captured
from tests.support.peft_oracles import (
    ALPHA,
    ORACLES,
    RANK,
    TOLERANCE,
    Oracle,
    gradients_of,
    loaded,
    peft_model,
    randomise,
    targets_of,
    use_ordinary_linears,
)
from tests.support.selection import broad_after, broad_unless, is_distinct, is_typical, slow_unless

PAIRS = [(case, name) for case in CASES for name, oracle in ORACLES.items() if case in oracle.cases]
FEW = ("LoRA", "DoRA", "IA3", "OFT")  # of those of the other models


@dataclass
class Pair:
    """A PEFT model and a graph with an adapter of ours at its start, at the same sites of one model."""

    oracle: Oracle
    case: Case
    model: nn.Module
    graph: fx.GraphModule
    new: fx.GraphModule
    theirs: Any

    def trained(self) -> tuple[Any, fx.GraphModule]:
        """Return PEFT's model with values away from the start, and the graph with the same, as written."""
        theirs = copy.deepcopy(self.theirs).double()
        randomise(theirs, self.case.size)
        # Not optimized: where a softmax is saturated a gradient is nothing but the order of rounding.
        return theirs, llfx.optimize(loaded(theirs, self.graph), Pipeline(()))

    @property
    def is_refused_in_peft(self) -> bool:
        """Return whether PEFT has the variant for ordinary linears, and the model has others."""
        return self.case is CASES["gpt2"] and not self.oracle.conv1d


@pytest.fixture(
    scope="module",
    params=broad_unless(
        lambda it: (it[0] == "mlp" and is_typical(it[1])) or it in (("llama", "LoRA"), ("gpt2", "LoRA")),
        slow_unless(lambda it: it[1] in FEW or (it[0] == "mlp" and is_distinct(it[1])), PAIRS),
    ),
    ids=" ".join,
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each variant on each model. No test changes it."""
    name, oracle = request.param[0], ORACLES[request.param[1]]
    return make_pair(name, oracle)


def make_pair(name: str, oracle: Oracle) -> Pair:
    model, graph = captured(name)
    torch.manual_seed(1)
    new = llfx.rewrite(graph, oracle.cls(**oracle.fields, **targets_of(name, oracle)[1]))
    return Pair(oracle, CASES[name], model, graph, new, peft_model(name, oracle, model))


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Assert equality relative to the largest value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    largest = expected.abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item() / (largest or 1)
    assert error <= tolerance, f"{what}: off by {error:.1e} of {largest:.1e}"


def output(model: nn.Module, case: Case, shape: tuple[int, int]) -> Tensor:
    y = model(**case.inputs(shape))
    return y if isinstance(y, Tensor) else y.logits


def run(model: nn.Module, case: Case, shape: tuple[int, int]) -> Tensor:
    """The output, after a backward pass from a fixed random functional of it."""
    model.zero_grad()
    y = output(model, case, shape)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * direction).sum().backward()
    return y.detach()


def test_sites_and_the_count_of_parameters_are_those_of_peft(pair: Pair) -> None:
    sites = {name.rpartition(".")[0] for name in llfx.adapter_state_dict(pair.new) if "." in name}
    assert sites == set(pair.theirs.targeted_module_names)
    ours = sum(parameter.numel() for parameter in llfx.adapter_parameters(pair.new))
    # AdaLoRA's is a number of its allocator, which PEFT calls trainable because of the prefix of its name.
    counters = sum("ranknum" in name for name, _ in pair.theirs.named_parameters())
    assert ours == pair.theirs.get_nb_trainable_parameters()[0] - counters


def test_deterministic_start_values_agree(pair: Pair) -> None:
    ours, theirs = llfx.adapter_state_dict(pair.new), llfx.adapter_state_dict(loaded(pair.theirs, pair.graph))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        expected = theirs[key]
        if pair.oracle.from_weight:
            # Up to the sign of the vectors, and to what PEFT loses in single precision.
            close(value.abs(), expected.abs(), f"start of {key}", 1e-4)
        elif key.rpartition(".")[2] not in pair.oracle.drawn:
            in_single = torch.equal(expected, expected.float().double())  # made in single precision
            close(value.float() if in_single else value, expected, f"start of {key}", 1e-12)


def test_outputs_and_gradients_agree_for_random_values(pair: Pair) -> None:
    theirs, ours = pair.trained()
    assert {type(variant) for variant, _ in by_config(ours)} == {pair.oracle.cls}
    for shape in ((3, 6), (2, 4)):
        close(run(ours, pair.case, shape), run(theirs, pair.case, shape), f"output of {shape}")
        gradients = gradients_of(theirs, pair.graph)
        trained = {name: tensor for name, tensor in ours.named_parameters() if tensor.requires_grad}
        assert trained.keys() <= gradients.keys()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            assert gradients[name].abs().max() > 0, f"{name}: a zero gradient compares nothing"
            close(parameter.grad, gradients[name], f"gradient of {name}, {shape}")


def test_merged_weights_agree_for_random_values(pair: Pair) -> None:
    theirs, ours = pair.trained()
    merged, expected = llfx.merge(ours), theirs.merge_and_unload()
    adapted = {f"{site}.weight" for site in pair.theirs.targeted_module_names}
    for name, parameter in merged.named_parameters():
        weight = expected.get_parameter(name)
        path = name.rpartition(".")[0]
        stored_alike = type(pair.model.get_submodule(path)) is type(expected.get_submodule(path))
        close(parameter, weight if stored_alike else weight.t(), f"merged {name}")
        if name in adapted:
            base = pair.model.get_parameter(name)
            assert (parameter - base).abs().max() > 0.05 * base.abs().max(), f"{name} has hardly been changed"


def test_what_we_save_computes_the_same_in_peft(pair: Pair, tmp_path: Path) -> None:
    _, ours = pair.trained()
    own_form = False if pair.oracle.from_weight else None
    if pair.is_refused_in_peft:
        with pytest.raises(llfx.ConfigError, match="Conv1D"):
            llfx.save_peft(ours, tmp_path, as_lora=own_form)
        assert not list(tmp_path.iterdir())
        return
    llfx.save_peft(ours, tmp_path, as_lora=own_form)
    base = copy.deepcopy(pair.model)
    if not pair.oracle.conv1d:
        use_ordinary_linears(base)
    reference = peft.PeftModel.from_pretrained(base.float() if pair.oracle.in_single else base, tmp_path).double()
    with torch.no_grad():
        theirs, expected, base_output = (output(of, pair.case, (3, 6)) for of in (reference.eval(), ours, pair.graph))
    close(theirs, expected, "output in PEFT")
    assert (expected - base_output).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_pissa_start_and_residual_sum_to_the_frozen_weight_as_in_peft(name: str) -> None:
    pair = make_pair(name, ORACLES["PiSSA"])
    s = ALPHA / RANK
    for site in pair.theirs.targeted_module_names:
        ours: Any = pair.new.get_submodule(site)
        theirs: Any = pair.theirs.get_submodule(f"base_model.model.{site}")
        transposed = isinstance(pair.model.get_submodule(site), Conv1D)
        weight: Tensor = pair.model.get_parameter(f"{site}.weight")
        residual = theirs.base_layer.weight
        weight, residual = (weight.t(), residual.t()) if transposed else (weight, residual)
        start = s * ours.lora_B0 @ ours.lora_A0
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        # Theirs is decomposed in float32, which errs the more, the closer the first value left out is to the last kept.
        close(start, s * b @ a, f"{site}: s B0 A0", tolerance=1e-4)
        close(weight - start, residual, f"{site}: W - s B0 A0", tolerance=1e-4)


@pytest.mark.parametrize(
    "name", broad_after(2, ["LoRA", "DoRA", "DeLoRA", "HRA", "C3A", "HRA orthogonal", "LoHa", "GraLoRA", "HiRA"])
)
def test_random_start_values_are_drawn_as_in_peft(name: str) -> None:
    oracle = ORACLES[name]
    model = nn.Sequential(nn.Linear(300, 200))
    config: Any = oracle.config(target_modules="0")
    config.r = rank = 16
    torch.manual_seed(0)
    ranked = {"r": rank} if issubclass(oracle.cls, WithRank) else {}
    gm = llfx.rewrite(model, oracle.cls(**{**oracle.fields, **ranked}, target_names=("0",)))
    reference = loaded(peft.get_peft_model(copy.deepcopy(model), config), llfx.capture(model))
    for drawn in oracle.drawn:
        ours, theirs = (of.get_parameter(f"0.{drawn}").detach() for of in (gm, reference))
        if name == "HRA":
            for start in (ours, theirs):
                assert torch.equal(start[::2], start[1::2]), "vectors come in pairs"
                assert not torch.equal(start[0], start[2]), "pairs differ"
        assert ours.mean().abs() < 0.1 * ours.std()
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
