"""Quantize the linears of small models in every way that is supported, and read them back independently."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.selection import slow_unless

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao.quantization")
    bnb = pytest.importorskip("bitsandbytes")
    hqq = pytest.importorskip("hqq.core.quantize")


def _torchao(config: Callable[[], Any], model: nn.Module) -> nn.Module:
    torchao.quantize_(model, config())
    return model


def _hqq(bits: int, model: nn.Module, axis: int = 1, group: int | None = 16) -> nn.Module:
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)

    def make(child: nn.Linear) -> nn.Module:
        linear = copy.deepcopy(child).requires_grad_(False)  # whose weight is let go
        module: nn.Module = hqq.HQQLinear(linear, config, compute_dtype=child.weight.dtype, device="cpu")
        return module.train(child.training)

    return _replaced(make, model)


def _bitsandbytes(kind: Callable[..., nn.Module], model: nn.Module) -> nn.Module:
    def make(child: nn.Linear) -> nn.Module:
        module = kind(child.in_features, child.out_features, child.bias is not None)
        module.load_state_dict(child.state_dict())
        return module.to("cpu").train(child.training)

    return _replaced(make, model)


def _replaced(make: Callable[[nn.Linear], nn.Module], model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear:
                parent._modules[name] = make(child)
    return model


def _four_bit(quant_type: str, nested: bool) -> Callable[..., nn.Module]:
    return partial(bnb.nn.Linear4bit, quant_type=quant_type, compress_statistics=nested)


def _grouped() -> Any:
    return torchao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009  # which its stubs lack
        granularity=torchao.PerGroup(32),
    )


STORAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": partial(_torchao, torchao.Int8WeightOnlyConfig),
    "torchao int4": partial(_torchao, _grouped),
    "torchao float8": partial(_torchao, torchao.Float8WeightOnlyConfig),
    "nf4": partial(_bitsandbytes, _four_bit("nf4", nested=False)),
    "nf4 twice": partial(_bitsandbytes, _four_bit("nf4", nested=True)),
    "fp4": partial(_bitsandbytes, _four_bit("fp4", nested=False)),
    "int8": partial(_bitsandbytes, partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)),
    "hqq 8": partial(_hqq, 8),
    "hqq 4": partial(_hqq, 4),
    "hqq 3": partial(_hqq, 3),
    "hqq 2, by columns": partial(_hqq, 2, axis=0),
    "hqq 1": partial(_hqq, 1),
}


def storages(*everyday: str, without: str = "none") -> list[Any]:
    """Return all storages as the parameters of a test, of which these are a part of the everyday run.

    Args:
        everyday: their names.
        without: those whose names begin so are left out.
    """
    return slow_unless(everyday.__contains__, [name for name in STORAGES if not name.startswith(without)])


def quantized(storage: str, model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose linears are quantized."""
    return STORAGES[storage](copy.deepcopy(model)).requires_grad_(False)


def held(module: Any) -> Tensor:
    """Return the tensor in which a quantized linear holds its values."""
    tensor: Tensor = module.W_q if isinstance(module, hqq.HQQLinear) else module.weight
    return tensor


def effective_weight(module: Any) -> Tensor:
    """Return the weight of a quantized linear, as the library that made it reads it."""
    if isinstance(module, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    elif isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, scale)
    elif isinstance(module, hqq.HQQLinear):
        weight = module.dequantize()
    else:
        weight = module.weight.dequantize()
    return weight.detach()


def dequantized(model: nn.Module) -> nn.Module:
    """Return the dense model that a quantized one stands for."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, (nn.Linear, hqq.HQQLinear)):
                weight = effective_weight(child)
                dense = nn.Linear(weight.shape[1], weight.shape[0], child.bias is not None, dtype=weight.dtype)
                dense.weight.data = weight
                if child.bias is not None:
                    dense.bias.data = child.bias.detach()
                parent._modules[name] = dense.train(child.training)
    return twin.requires_grad_(False)
