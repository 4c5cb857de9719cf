"""Linears of 4 bits of bitsandbytes: after a call that packs their weights, and with a type to multiply in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.shared_copy import shared_copy
from lora_lite_fx.storage.dequantized import stand_ins
from lora_lite_fx.testing.comparisons import close
from tests.support.conformance import randomise
from tests.support.quantized import library
from tests.support.selection import broad_after

CFG = llfx.LoRA(r=2, target_names=".")


def linear(nested: bool = False, **fields: Any) -> Any:
    """Return a linear of 4 bits whose rows have two scales each, of which the second is larger."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    plain.weight.data[:, 64:] *= 3
    module = library("bitsandbytes").nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=nested, **fields)
    module.load_state_dict(plain.state_dict())
    return module.to("cpu").eval()


def packed(module: Any) -> Any:
    """Return the linear as a call in evaluation leaves it on a CPU that knows bfloat16."""
    pack = library("bitsandbytes.functional")._convert_weight_packed_for_cpu
    module.weight.data, module.weight.quant_state = pack(module.weight.data, module.weight.quant_state)
    return module


def read(module: nn.Module) -> Tensor:
    """Return the weight as this library reads it."""
    (stand_in,) = stand_ins(shared_copy(nn.Sequential(module))).values()
    return stand_in.effective_weight()


@pytest.mark.parametrize("nested", [False, True])
def test_a_packed_weight_is_read_with_each_scale_in_its_place(nested: bool) -> None:
    expected = read(linear(nested))
    close(read(packed(linear(nested))), expected, 5e-3, "the weight, whose scales were rounded")


def test_a_weight_that_bitsandbytes_unpacked_itself_is_read_too() -> None:
    module = packed(linear())
    module.state_dict()  # unpacks it, and leaves the scales as they are
    assert not module.weight.quant_state.packing_format_for_cpu
    assert module.weight.quant_state.absmax.dim() == 2
    close(read(module), read(linear()), 5e-3, "the weight")


@pytest.mark.parametrize("front_door", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize("examples", [True, False])
def test_a_packed_model_can_be_adapted(front_door: Any, examples: bool) -> None:
    module = packed(linear())
    model = nn.Sequential(module)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    adapted = front_door(model, CFG, (x,) if examples else None)
    close(adapted(x), x @ read(linear()).T + module.bias, 5e-3, "the output")


@pytest.mark.parametrize("compute", broad_after(1, [torch.bfloat16, torch.float16, torch.float64]))
def test_wrap_multiplies_in_the_type_of_the_linear_as_the_graph_does(compute: torch.dtype) -> None:
    model = nn.Sequential(linear(compute_dtype=compute), nn.Tanh(), nn.Linear(64, 3)).train()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    graph = llfx.capture(model, (x,))
    cfgs = [CFG, llfx.DoRA(r=2, target_names="0")]
    gm, wrapped = llfx.rewrite(graph, cfgs), llfx.wrap(graph, cfgs)
    randomise(gm, 1)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    results = []
    for each in (gm, wrapped):
        y = each(x)
        assert y.dtype is torch.float32
        results.append([y, *torch.autograd.grad(y.square().sum(), llfx.adapter_parameters(each))])
    names = list(llfx.adapter_state_dict(gm))
    for name, ours, expected in zip(["output", *names], *results, strict=True):
        close(ours, expected, 1e-5, name)
    assert not torch.equal(gm(x), llfx.remove(gm)(x))
