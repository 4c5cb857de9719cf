"""A cast of a captured graph is right, or an error at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.peft_models import captured
from tests.support.selection import broad_after, slow_after


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


X = torch.randn(3, 16)
TARGETS: dict[str, Any] = {"target_names": "0|2"}
FOLLOW = [llfx.LoRA, llfx.VeRA, llfx.IA3, llfx.PiSSA]
REFUSE = [llfx.DoRA, llfx.HRA]


@pytest.mark.parametrize("cls", broad_after(1, slow_after(3, FOLLOW)))
@pytest.mark.parametrize("inputs", [None, (torch.randn(2, 16),)], ids=["traced", "exported"])
@pytest.mark.parametrize("dtype", broad_after(1, [torch.bfloat16, torch.float64]))
def test_a_graph_that_holds_no_dtypes_follows(cls: Any, inputs: Any, dtype: torch.dtype) -> None:
    gm = llfx.rewrite(net(), cls(**TARGETS), inputs)
    randomise(gm, 3)
    other = llfx.rewrite(
        net().to(dtype), cls(dtype=dtype, **TARGETS), None if inputs is None else (inputs[0].to(dtype),)
    )
    llfx.load_adapter_state_dict(other, {name: t.to(dtype) for name, t in llfx.adapter_state_dict(gm).items()})
    gm(X)  # a program that was derived before
    gm.to(dtype)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            assert torch.equal(gm.train(training)(X.to(dtype)), other.train(training)(X.to(dtype)))


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "to": lambda gm: gm.to(torch.bfloat16),
    "half": lambda gm: gm.half(),
    "bfloat16": lambda gm: gm.bfloat16(),
    "double": lambda gm: gm.double(),
    "type": lambda gm: gm.type(torch.float64),
    "around": lambda gm: nn.Sequential(gm).to(torch.float64),
}


@pytest.mark.parametrize("cast", broad_after(2, CASTS))
@pytest.mark.parametrize("cls", broad_after(1, REFUSE))
def test_a_graph_that_holds_dtypes_refuses_at_once_and_stays(cast: str, cls: Any) -> None:
    gm = llfx.rewrite(net(), cls(**TARGETS))
    randomise(gm, 3)
    before = gm(X)
    with pytest.raises(llfx.AdapterError, match=r"cannot be cast from float32 to .*The way out: cast the model, then"):
        CASTS[cast](gm)
    assert {tensor.dtype for tensor in gm.parameters()} == {torch.float32}
    assert torch.equal(gm(X), before)


@pytest.mark.broad
def test_tensors_that_were_cast_one_by_one_are_named_by_the_call_that_fails() -> None:
    gm = llfx.rewrite(captured("llama")[1], llfx.LoRA(r=2))
    for parameter in gm.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(llfx.CallError, match="is bfloat16 in this call, and the graph was captured for float64"):
        gm(torch.tensor([[1, 2, 3]]))


@pytest.mark.broad
def test_a_language_model_refuses_and_may_be_moved() -> None:
    gm = llfx.rewrite(captured("llama")[1], llfx.LoRA(r=2))
    with pytest.raises(llfx.AdapterError, match="from float64 to bfloat16"):
        gm.to(torch.bfloat16)
    for harmless in (gm.double, gm.cpu, lambda: gm.to("cpu"), lambda: gm.to(torch.float64), gm.share_memory):
        harmless()


def test_a_function_of_ones_own_is_applied_as_it_was() -> None:
    gm = llfx.rewrite(net(), llfx.DoRA(**TARGETS))

    def only_whole(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            raise RuntimeError("no elements")
        return tensor * 2

    weight = gm.get_parameter("0.weight").detach().clone()
    gm._apply(only_whole)
    assert torch.equal(gm.get_parameter("0.weight"), 2 * weight)
