"""PEFT directories, both ways: what PEFT saved computes the same here, what we save computes the same in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import by_config
from tests.support.peft_models import CASES, Case
from tests.support.peft_oracles import ORACLES, TOLERANCE, Pair, make_pair, use_ordinary_linears
from tests.support.selection import broad_unless, is_distinct, slow_unless

PAIRS = [(case, name) for case in CASES for name, oracle in ORACLES.items() if case in oracle.cases]
FEW = ("LoRA", "DoRA", "IA3", "OFT")  # of those of the other models


def output(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        y = model(**case.inputs((3, 6)))
    return y if isinstance(y, Tensor) else y.logits


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(
    scope="module",
    params=broad_unless(
        lambda it: it[0] == "mlp" or it[1] == "LoRA",
        slow_unless(lambda it: it[1] in FEW or (it[0] == "mlp" and is_distinct(it[1])), PAIRS),
    ),
    ids=" ".join,
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each variant on each model, with random values. No test changes it."""
    case, oracle = request.param
    pair = make_pair(case, ORACLES[oracle])
    pair.randomise()
    pair.ours.eval()
    return pair


def base_for_peft(pair: Pair) -> nn.Module:
    """A fresh copy of the base, in which PEFT can have the variant."""
    model = copy.deepcopy(pair.model)
    if not pair.oracle.conv1d:
        use_ordinary_linears(model)
    return model.float() if pair.oracle.in_single else model


def test_what_peft_saved_computes_the_same_here(pair: Pair, tmp_path: Path) -> None:
    pair.theirs.save_pretrained(str(tmp_path))
    graph = llfx.remove(pair.ours)
    loaded = llfx.load_peft(graph, tmp_path).eval()
    close(output(loaded, pair.case), output(pair.theirs, pair.case))
    ours = {type(variant) for variant, _ in by_config(loaded)}
    assert ours == {pair.oracle.cls}


def test_what_we_save_computes_the_same_in_peft(pair: Pair, tmp_path: Path) -> None:
    expected = output(pair.ours, pair.case)
    own_form = False if pair.oracle.from_weight else None
    if pair.case is CASES["gpt2"] and not pair.oracle.conv1d:
        with pytest.raises(llfx.ConfigError, match="Conv1D"):
            llfx.save_peft(pair.ours, tmp_path, as_lora=own_form)
        assert not list(tmp_path.iterdir())
        return
    llfx.save_peft(pair.ours, tmp_path, as_lora=own_form)
    reference = peft.PeftModel.from_pretrained(base_for_peft(pair), tmp_path).double().eval()
    close(output(reference, pair.case), expected)
    assert (expected - output(llfx.remove(pair.ours), pair.case)).abs().max() > 1e-3 * expected.abs().max()
