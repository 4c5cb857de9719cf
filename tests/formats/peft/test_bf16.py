"""On a bfloat16 base, with adapters in single precision, we lose no more than PEFT does."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from tests.support.peft_models import CASES, captured
from tests.support.peft_oracles import ORACLES, Oracle, loaded, peft_model, randomise
from tests.support.selection import broad_after, slow_unless

PAIRS = [(case, name) for case in ("mlp", "llama") for name, oracle in ORACLES.items() if case in oracle.cases]
FEW = ("LoRA", "DoRA", "HRA", "OFT", "PSOFT")  # of those of the language model
# Errors of a few hundredths of what rounding a result to bfloat16 costs (2^-9) are no difference.
FLOOR = 1e-4
# Both round in the same places, but add up in another order.
FACTOR = 1.05
# PEFT multiplies W by the adapter in single precision and runs that in place of the base, which takes several times as
# long. Calling the base once, in its own precision, costs one rounding more (at most sqrt(2) at a site).
ROUNDED_ONCE = {"HRA": 1.25, "HRA orthogonal": 1.25, "MiSS bat": 1.15}


@functools.cache
def bases(name: str) -> tuple[nn.Module, fx.GraphModule, fx.GraphModule]:
    """The model in bfloat16, its graph, and the graph of the same weights in double precision."""
    half = copy.deepcopy(captured(name)[0]).bfloat16()
    exact = copy.deepcopy(half).double()
    return (
        half,
        llfx.capture(half, inputs(name, 6, torch.bfloat16)),
        llfx.capture(exact, inputs(name, 6, torch.float64)),
    )


def inputs(name: str, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    given = CASES[name].inputs((32, length))
    return {key: x.bfloat16().to(dtype) if x.is_floating_point() else x for key, x in given.items()}


def adapted(name: str, oracle: Oracle) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same adapter by us, by PEFT, and in double precision; of such a size that little is amplified."""
    half, graph, exact = bases(name)
    theirs = peft_model(name, oracle, half)
    # Of full rank, RandLoRA is much larger than others of such values.
    randomise(theirs, 0.03 if oracle.cls is llfx.RandLoRA else 0.25)
    ours = loaded(theirs, graph)
    assert {p.dtype for p in llfx.adapter_parameters(ours)} == {torch.float32}
    return ours, theirs, loaded(theirs, exact)


def output(model: nn.Module, name: str, length: int, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        y = model(**inputs(name, length, dtype))
    return (y if isinstance(y, Tensor) else y.logits).double()


def error(model: nn.Module, exact: nn.Module, name: str) -> float:
    """The root mean square over several inputs, relative to the outputs."""
    ours, true = (
        torch.cat([output(of, name, length, dtype).flatten() for length in (3, 5, 8, 12)])
        for of, dtype in ((model, torch.bfloat16), (exact, torch.float64))
    )
    error: float = ((ours - true).norm() / true.norm()).item()
    return error


@pytest.mark.broad
@pytest.mark.parametrize("pair", broad_after(2, slow_unless(lambda it: it[1] in FEW, PAIRS)), ids="-".join)
def test_the_error_on_a_bfloat16_base_is_no_larger_than_that_of_peft(pair: tuple[str, str]) -> None:
    case, name = pair
    ours, theirs, exact = adapted(case, ORACLES[name])
    assert 0 < error(ours, exact, case) <= ROUNDED_ONCE.get(name, FACTOR) * error(theirs, exact, case) + FLOOR
