"""Stand in for a quantized module: compute its weight in plain sight, and multiply with it as any linear does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.recomputed_product import RecomputedProduct
from . import bitsandbytes, torchao
from .stored_weight import StoredWeight

STORAGES: tuple[Callable[[nn.Module, torch.dtype], StoredWeight | None], ...] = (
    torchao.stored_weight,
    bitsandbytes.stored_weight,
)
"""The storages. Each takes a module, and the type that weights have where a storage does not know; see `StoredWeight`.
"""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class DequantizedLinear(nn.Module):
    """`y = x W^T + b` with a `W` that is computed in each call, of the tensors in which a module stores it.

    The backward pass computes `W` again. It saves neither `W` nor `x`.

    Args:
        module: the quantized linear, which stays as it is. Its tensors are shared.
        stored: its weight.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Module, stored: StoredWeight) -> None:
        super().__init__()
        self.kind = stored.kind
        self.dequantize = stored.dequantize
        self.compute_dtype = stored.compute_dtype
        self.names = tuple(stored.tensors)
        for name, tensor in stored.tensors.items():
            if name == "weight":  # a parameter, because that is what a weight is for those who look for weights
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=False)
        bias: Any = module.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        with torch.no_grad():
            self.out_features, self.in_features = self.effective_weight().shape
        for name in _HOOKS:
            vars(self)[name].update(getattr(module, name))
        vars(self)["original"] = Original(module, stored.quantize)
        self.train(module.training)

    def effective_weight(self) -> Tensor:
        """Return `W (d_out, d_in)`."""
        return self.dequantize(*(getattr(self, name) for name in self.names))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`, in the type of `x`."""
        compute = self.compute_dtype
        if compute is None or not isinstance(x, Tensor) or x.dtype is compute:
            return self._product(x)
        return self._product(x.to(compute)).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in self.names]
        if not isinstance(x, Tensor):  # symbolic tracing knows no types
            return F.linear(x, self.dequantize(*tensors), self.bias)
        bias = self.bias if self.bias is None or self.bias.dtype is x.dtype else self.bias.to(x.dtype)
        return RecomputedProduct(Weight(self.dequantize, x.dtype))(x, bias, *tensors)

    def extra_repr(self) -> str:
        """Return the line that `repr` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


@dataclass(frozen=True)
class Weight:
    """`None, *tensors -> (W,)` in a type: the recipe of a product."""

    dequantize: Callable[..., Tensor]
    dtype: torch.dtype

    def __call__(self, _: None, *tensors: Tensor) -> tuple[Tensor]:
        """Return the weight."""
        weight = self.dequantize(*tensors)
        return (weight if weight.dtype is self.dtype else weight.to(self.dtype),)


class Original:
    """The module that a `DequantizedLinear` stands for, and its way to quantize. Copies of the stand-in share it."""

    def __init__(self, module: nn.Module, quantize: Any) -> None:
        self.module = module
        self.quantize = quantize

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        return self


def share_dequantized(model: nn.Module, memo: dict[int, Any]) -> None:
    """Prepare `memo` such that `copy.deepcopy(model, memo)` has a stand-in for each quantized linear of `model`.

    Raises:
        ConfigError: such a module has no weight that can be read.
    """
    plain = (parameter.dtype for parameter in model.parameters() if type(parameter) is nn.Parameter)
    dtype = next((dtype for dtype in plain if dtype.is_floating_point), torch.get_default_dtype())
    for module in model.modules():
        for stored_weight in STORAGES:
            if (stored := stored_weight(module, dtype)) is not None:
                memo[id(module)] = DequantizedLinear(module, stored)


def restore_quantized(model: nn.Module) -> None:
    """Put the quantized modules back into `model`, a copy that has stand-ins: new modules over the same tensors."""
    memo: dict[int, Any] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, DequantizedLinear):
                parent._modules[name] = _copy_over_tensors(vars(child)["original"].module, memo).train(child.training)


def _copy_over_tensors(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Return a copy of a module over the same tensors, also those that stand in attributes of tensors and objects."""
    for tensor in [*module.parameters(), *module.buffers()]:
        memo[id(tensor)] = tensor
    for value in vars(module).values():
        for inner in vars(value).values() if hasattr(value, "__dict__") else ():
            if isinstance(inner, Tensor):
                memo[id(inner)] = inner
    return copy.deepcopy(module, memo)
