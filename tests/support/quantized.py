"""Quantize the linears of small models in every way that is supported, and read them back independently.

A test that needs a library which is not installed is skipped when it asks for it.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lite_fx.errors import is_instance_of
from tests.support.releases import has
from tests.support.selection import slow_unless


def library(name: str) -> Any:
    """Import a module of a library that quantizes; skip the test that asks for it if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@dataclass(frozen=True)
class Storage:
    """A way to quantize.

    Attributes:
        needs: the module of a library that does it.
        quantize: quantizes the linears of a model by that module, in place.
    """

    needs: str
    quantize: Callable[[Any, nn.Module], object]

    def __call__(self, model: nn.Module) -> nn.Module:
        """Quantize the linears of a model, in place, and return it."""
        self.quantize(library(self.needs), model)
        return model

    @property
    def installed(self) -> bool:
        """Whether the library is there."""
        try:
            importlib.import_module(self.needs)
        except ImportError:
            return False
        return True


def by_linear(needs: str, make: Callable[[Any, nn.Linear], nn.Module]) -> Storage:
    """Return the storage whose library makes a module of each linear."""

    def quantize(library: Any, model: nn.Module) -> None:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if type(child) is nn.Linear:
                    parent._modules[name] = make(library, child).train(child.training)

    return Storage(needs, quantize)


def _torchao(config: Callable[[Any], Any]) -> Storage:
    return Storage("torchao.quantization", lambda torchao, model: torchao.quantize_(model, config(torchao)))


def _grouped(torchao: Any) -> Any:
    int4 = getattr(torch, "int4")  # noqa: B009  # which its stubs lack
    return torchao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=torchao.PerGroup(32))


def _bitsandbytes(kind: str, **fields: Any) -> Storage:
    def make(bnb: Any, linear: nn.Linear) -> nn.Module:
        has_bias = linear.bias is not None
        module: nn.Module = getattr(bnb.nn, kind)(linear.in_features, linear.out_features, has_bias, **fields)
        module.load_state_dict(linear.state_dict())
        return module.to("cpu")

    return by_linear("bitsandbytes", make)


def _hqq(bits: int, axis: int = 1) -> Storage:
    def make(hqq: Any, linear: nn.Linear) -> nn.Module:
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=16, axis=axis)
        twin = copy.deepcopy(linear).requires_grad_(False)  # whose weight is let go
        module: nn.Module = hqq.HQQLinear(twin, config, compute_dtype=linear.weight.dtype, device="cpu")
        return module

    return by_linear("hqq.core.quantize", make)


def _quanto(qtype: str) -> Storage:
    def quantize(quanto: Any, model: nn.Module) -> None:
        quanto.quantize(model, weights=getattr(quanto, qtype))
        quanto.freeze(model)

    return Storage("optimum.quanto", quantize)


def _compressed(**weights: Any) -> Storage:
    def quantize(compressors: Any, model: nn.Module) -> None:
        schemes, lifecycle = (
            library("compressed_tensors.quantization"),
            library("compressed_tensors.quantization.utils"),
        )
        scheme = schemes.QuantizationScheme(targets=["Linear"], weights=schemes.QuantizationArgs(**weights))
        config = schemes.QuantizationConfig(config_groups={"all": scheme})
        schemes.apply_quantization_config(model, config, show_progress=False)
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                _calibrate(lifecycle, module)
        compressors.ModelCompressor(quantization_config=config).compress_model(model)

    return Storage("compressed_tensors.compressors", quantize)


def _calibrate(utils: Any, module: Any) -> None:
    """Give a linear the scales that fit its weight."""
    args, weight = module.quantization_scheme.weights, module.weight.detach()
    rows, columns = args.block_structure or (1, args.group_size or weight.shape[1])
    height, width = weight.shape
    whole = nn.functional.pad(weight, (0, -width % columns, 0, -height % rows))  # a block at the edge may be smaller
    blocks = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale, zero = utils.calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)


def _fp8(block: tuple[int, int] | None) -> Storage:
    def make(fp8: Any, linear: nn.Linear) -> nn.Module:
        has_bias = linear.bias is not None
        module: nn.Module = fp8.FP8Linear(linear.in_features, linear.out_features, block, has_bias=has_bias)
        config = SimpleNamespace(weight_block_size=block, scale_fmt="float")
        made = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": linear.weight.detach()})
        if "weight_scale_inv" not in made:
            return linear  # transformers leaves a weight alone that blocks do not divide
        made["weight_scale_inv"] = made["weight_scale_inv"].reshape(module.get_parameter("weight_scale_inv").shape)
        if has_bias:
            made["bias"] = linear.bias
        module.load_state_dict(made)
        return module

    return by_linear("transformers.integrations.finegrained_fp8", make)


STORAGES: dict[str, Storage] = {
    "torchao int8": _torchao(lambda torchao: torchao.Int8WeightOnlyConfig()),
    "torchao int4": _torchao(_grouped),
    "torchao float8": _torchao(lambda torchao: torchao.Float8WeightOnlyConfig()),
    "nf4": _bitsandbytes("Linear4bit", quant_type="nf4", compress_statistics=False),
    "nf4 twice": _bitsandbytes("Linear4bit", quant_type="nf4", compress_statistics=True),
    "fp4": _bitsandbytes("Linear4bit", quant_type="fp4", compress_statistics=False),
    "int8": _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "hqq 8": _hqq(8),
    "hqq 4": _hqq(4),
    "hqq 3": _hqq(3),
    "hqq 2, by columns": _hqq(2, axis=0),
    "hqq 1": _hqq(1),
    "quanto int8": _quanto("qint8"),
    "quanto int4": _quanto("qint4"),
    "quanto int2": _quanto("qint2"),
    "quanto float8": _quanto("qfloat8"),
    "compressed 4": _compressed(num_bits=4, group_size=16, strategy="group"),
    "compressed 4, zero points": _compressed(num_bits=4, group_size=16, strategy="group", symmetric=False),
    "compressed 8": _compressed(num_bits=8, strategy="channel"),
    "compressed float8": _compressed(num_bits=8, type="float", strategy="block", block_structure=[16, 16]),
    "fp8": _fp8((16, 16)),
    "fp8, one scale": _fp8(None),
}


def storages(*everyday: str, without: tuple[str, ...] = ()) -> list[Any]:
    """Return all storages as the parameters of a test, of which these are a part of the everyday run.

    Args:
        everyday: their names.
        without: those whose names begin so are left out.
    """
    return slow_unless(everyday.__contains__, [name for name in STORAGES if not name.startswith(without)])


def installed() -> list[str]:
    """Return the names of the storages whose library is there, for a test that draws one."""
    return [name for name, storage in STORAGES.items() if storage.installed]


def quantized(storage: str, model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose linears are quantized."""
    return STORAGES[storage](copy.deepcopy(model)).requires_grad_(False)


def held(module: Any) -> Tensor:
    """Return the tensor in which a quantized linear holds its values."""
    name = next(name for name in ("W_q", "weight_packed", "weight") if hasattr(module, name))
    tensor: Tensor = getattr(module, name)
    return tensor


def effective_weight(module: Any) -> Tensor:
    """Return the weight of a quantized linear, as the library that made it reads it."""
    if is_instance_of(module, "bitsandbytes", "Linear4bit"):
        functional = library("bitsandbytes.functional")
        weight: Tensor = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    elif is_instance_of(module, "bitsandbytes", "Linear8bitLt"):
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        weight = library("bitsandbytes.functional").int8_vectorwise_dequant(module.weight.data, scale)
    elif hasattr(module, "quantization_scheme"):
        module = copy.deepcopy(module)
        library("compressed_tensors.compressors").decompress_module(module)
        weight = module.weight
    elif is_instance_of(module, "transformers", "FP8Linear"):
        if not has("transformers", "5.24"):
            pytest.skip("transformers reads weights of eight bits in plain sight since 5.24")
        fp8 = library("transformers.integrations.finegrained_fp8")
        weight = fp8._dequantize_fp8_weight(module.weight, module.weight_scale_inv, module.block_size, torch.float32)
    elif is_instance_of(module, "hqq"):
        weight = module.dequantize()
    else:
        weight = module.weight.dequantize()
    return weight.detach()


def dequantized(model: nn.Module) -> nn.Module:
    """Return the dense model that a quantized one stands for."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) or is_instance_of(module, "hqq", "HQQLinear"):
            weight = effective_weight(module)
            bias: Any = module.bias
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
            dense.weight.data = weight
            if bias is not None:
                dense.bias.data = bias.detach()
            memo[id(module)] = dense.train(module.training)
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin.requires_grad_(False)
