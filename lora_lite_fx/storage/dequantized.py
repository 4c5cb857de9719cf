"""Stand in for a quantized module: compute its weight in plain sight, and multiply with it as any linear does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AdapterError
from ..graph.replacing import replace_modules
from ..ops.recomputed_product import RecomputedProduct
from . import bitsandbytes, compressed_tensors, fp8, hqq, quanto, torchao, unreadable
from .embedding import DequantizedEmbedding, stored_rows
from .stand_in import StandIn
from .stored_weight import StoredWeight

STORAGES: tuple[Callable[[nn.Module, torch.dtype], StoredWeight | None], ...] = (
    torchao.stored_weight,
    bitsandbytes.stored_weight,
    hqq.stored_weight,
    quanto.stored_weight,
    compressed_tensors.stored_weight,
    fp8.stored_weight,
    unreadable.stored_weight,
)
"""The storages. Each takes a module, and the type that weights have where a storage does not know; see `StoredWeight`.
"""


class DequantizedLinear(StandIn):
    """`y = x W^T + b` with a `W` that is computed in each call, of the tensors in which a module stores it.

    The backward pass computes `W` again. It saves neither `W` nor `x`.

    Args:
        module: the quantized linear, which stays as it is. Its tensors are shared.
        stored: its weight.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Module, stored: StoredWeight) -> None:
        super().__init__(module, stored.tensors, stored.again)
        self.kind = stored.kind
        self.dequantize = stored.dequantize
        self.compute_dtype = stored.compute_dtype
        bias: Any = module.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.out_features, self.in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]

    def effective_weight(self) -> Tensor:
        """Return `W (d_out, d_in)`."""
        return self.dequantize(*(getattr(self, name) for name in self.names))

    def requantized(self, weight: Tensor) -> DequantizedLinear:
        """Return the stand-in of a module that holds another `W (d_out, d_in)`, quantized in the same way.

        Raises:
            AdapterError: the storage cannot do that.
        """
        assert self.original.again is not None
        try:
            module = self.original.again(weight)
        except NotImplementedError as error:
            raise AdapterError(
                f"A weight cannot be quantized as the frozen one is, because {error}. The way out: merge without"
                " requantise, and quantize the merged model."
            ) from error
        stored = stored_weight_of(module, weight.dtype)
        assert stored is not None
        return DequantizedLinear(module, stored)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return `x W^T + b`, in the type of `x`. The one argument may have any name, as for the module."""
        (x,) = (*args, *kwargs.values())
        return self.product(x)

    def product(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return `x W^T + b`, with a dense `weight` or a `bias` in place of the frozen ones if they are given."""
        bias = self.bias if bias is None else bias
        tensors = [getattr(self, name) for name in self.names]
        if not isinstance(x, Tensor):  # symbolic tracing knows no types
            return F.linear(x, self.dequantize(*tensors), bias)
        compute = self.compute_dtype or x.dtype
        inside = x if x.dtype is compute else x.to(compute)
        bias = bias if bias is None or bias.dtype is compute else bias.to(compute)
        if weight is None and not torch.compiler.is_compiling():  # which chooses itself what to save
            y = RecomputedProduct(Weight(self.dequantize, compute))(inside, bias, *tensors)
        else:
            dense = self.dequantize(*tensors) if weight is None else weight
            y = F.linear(inside, dense if dense.dtype is compute else dense.to(compute), bias)
        return y if y.dtype is x.dtype or x.dtype is compute else y.to(x.dtype)

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


def share_dequantized(model: nn.Module, memo: dict[int, Any]) -> None:
    """Prepare `memo` such that `copy.deepcopy(model, memo)` has a stand-in for each quantized linear and
    embedding of `model`.

    Raises:
        ConfigError: such a module has no weight that can be read.
    """
    types = (parameter.dtype for parameter in model.parameters() if type(parameter) is nn.Parameter)
    plain = (dtype for dtype in types if dtype.is_floating_point and dtype.itemsize > 1)
    dtype = next(plain, torch.get_default_dtype())
    for module in model.modules():
        if (stored := stored_weight_of(module, dtype)) is not None:
            memo[id(module)] = DequantizedLinear(module, stored)
        elif (rows := stored_rows(module)) is not None:
            memo[id(module)] = DequantizedEmbedding(module, rows)


def stored_weight_of(module: nn.Module, dtype: torch.dtype) -> StoredWeight | None:
    """Return the weight of a quantized linear; None for other modules."""
    return next((stored for storage in STORAGES if (stored := storage(module, dtype)) is not None), None)


def restore_quantized(model: nn.Module) -> None:
    """Put the quantized modules back into `model`, a copy that has stand-ins: new modules over the same tensors."""
    restored: dict[nn.Module, nn.Module] = {}
    for stand_in in model.modules():
        if isinstance(stand_in, StandIn):
            module: Any = stand_in.restored()
            restored[stand_in] = module
            if isinstance(stand_in, DequantizedLinear):
                module.bias = stand_in.bias  # which an adapter may have changed
    replace_modules(model, restored)
    compressed_tensors.put_decompression_back(model)


def stand_ins(model: nn.Module) -> dict[str, DequantizedLinear]:
    """Return the stand-ins of the linears of a copy of a quantized model, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DequantizedLinear)}


def error_of(weight: Tensor, stored: DequantizedLinear) -> float:
    """Return how far a stored weight is from the exact one, as a multiple of the exact one's norm."""
    exact = weight.double()
    return float((stored.effective_weight().double() - exact).norm() / exact.norm().clamp_min(1e-300))
