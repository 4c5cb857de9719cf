"""LoRA that starts from the quantization error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close
from tests.storage.test_dequantized import Net, X, adapted
from tests.support.quantized import STORAGES, dequantized, effective_weight, quantized, storages


def dense_net() -> Net:
    torch.manual_seed(0)
    return Net()


def residual(exact: Tensor, weight: Tensor) -> float:
    return float((exact - weight).norm() / exact.norm())


@pytest.mark.parametrize("storage", storages("nf4 twice"))
def test_the_start_is_the_nearest_matrix_of_its_rank(storage: str) -> None:
    dense = dense_net()
    model = quantized(storage, dense)
    gm = llfx.rewrite(model, llfx.LoRA(r=4, alpha=12, target_names=(".",)))
    distances = llfx.loftq(gm, dense)
    merged = llfx.merge(gm)
    assert distances.keys() == {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    for name, (before, after) in distances.items():
        exact = dense.get_parameter(f"{name}.weight")
        assert residual(exact, effective_weight(model.get_submodule(name))) == pytest.approx(before, rel=1e-4)
        assert residual(exact, merged.get_parameter(f"{name}.weight")) == pytest.approx(after, rel=1e-4)
        rest = torch.linalg.svdvals(exact - effective_weight(model.get_submodule(name)))[4:]
        assert after == pytest.approx(float(rest.norm() / exact.norm()), rel=1e-4)
        assert after < before


@pytest.mark.broad
def test_what_it_cannot_start_is_refused_and_nothing_changes() -> None:
    dense = dense_net()
    model = quantized(next(iter(STORAGES)), dense)
    gm = llfx.rewrite(model, llfx.DoRA(r=2, target_names="out"))
    with pytest.raises(llfx.ConfigError, match=r"starts LoRA without a bias, and 'out' has DoRA"):
        llfx.loftq(gm, dense)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)))
    state = {name: tensor for name, tensor in dense.state_dict().items() if name != "out.weight"}
    with pytest.raises(llfx.AdapterError, match=r"'out\.weight' \(32, 64\), which is not there"):
        llfx.loftq(gm, state)
    assert not any(tensor.any() for name, tensor in llfx.adapter_state_dict(gm).items() if name.endswith("lora_B"))
    with pytest.raises(llfx.AdapterError, match="no adapter at a quantized site"):
        llfx.loftq(llfx.rewrite(dense, llfx.LoRA(r=2, target_names=(".",))), dense)


@pytest.mark.broad
def test_named_adapters_and_banks_are_those_of_the_dense_weights() -> None:
    model = quantized("nf4 twice", dense_net())
    outputs = []
    for each in (model, dequantized(model)):
        gm = adapted("exported", each, {"one": llfx.LoRA(r=2, target_names="out"), "two": llfx.IA3(target_names=".")})
        with llfx.active(gm, "two"), llfx.scaled(gm, {"two": 0.5}):
            outputs.append(gm(*X))
        with llfx.active(gm, None):
            outputs.append(gm(*X))
        bank = adapted("exported", each, llfx.Bank(llfx.LoRA(r=2, target_names="out"), slots=3))
        outputs.append(bank(*X, adapter_ids=torch.tensor([0, -1, 2, 1, 0])))
    for actual, expected in zip(outputs[:3], outputs[3:], strict=True):
        close(actual, expected, 1e-5, "output")
