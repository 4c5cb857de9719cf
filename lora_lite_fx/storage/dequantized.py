"""Stand in for a quantized module: compute its weight in plain sight, and multiply with it as any linear does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch_modules import FORWARD_HOOKS, FORWARD_PRE_HOOKS, HOOKS_WITH_KEYWORDS, hooks_of
from ..errors import AdapterError
from ..graph.replacing import replace_modules
from ..ops.recomputed_product import RecomputedProduct
from .storages import STORAGES, stored_weight_of
from .stored_weight import StoredWeight, copy_over_memory


class Original:
    """The module that a stand-in stands for. Copies of the stand-in share it.

    Args:
        module: the module.
        store: puts another weight into a copy of it; None if nothing can.
    """

    def __init__(self, module: nn.Module, store: Callable[[Any, Tensor], None] | None) -> None:
        self.module = module
        self.store = store

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        return self


class StandIn(nn.Module):
    """Has the tensors, the hooks and the mode of a quantized module, and computes in plain sight.

    Args:
        module: the quantized module, which stays as it is. Its tensors are shared.
        stored: its weight.
    """

    def __init__(self, module: nn.Module, stored: StoredWeight) -> None:
        super().__init__()
        self.kind, self.dequantize, self.names = stored.kind, stored.dequantize, tuple(stored.tensors)
        for name, tensor in stored.tensors.items():
            # Parameters, because Dynamo takes inputs that are not parameters for data.
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for registry in (*FORWARD_HOOKS, *HOOKS_WITH_KEYWORDS):
            hooks_of(self, registry).update(hooks_of(module, registry))
        self.original = Original(copy_over_memory(module), stored.store)  # as it is now
        self.train(module.training)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by their names here."""
        return {name: getattr(self, name) for name in self.names}

    def restored(self) -> nn.Module:
        """Return a module as the quantized one was, over the same tensors."""
        module: nn.Module = copy_over_memory(self.original.module).train(self.training)
        return module


class DequantizedLinear(StandIn):
    """`y = x W^T + b` with a `W` that is computed in each call, of the tensors in which a module stores it.

    The backward pass computes `W` again. It saves neither `W` nor `x`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Module, stored: StoredWeight) -> None:
        super().__init__(module, stored)
        self.compute_dtype = stored.compute_dtype
        bias: Any = module.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.out_features, self.in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]

    def effective_weight(self) -> Tensor:
        """Return `W (d_out, d_in)`."""
        return self.dequantize(*self.tensors.values())

    def requantized(self, weight: Tensor) -> DequantizedLinear:
        """Return the stand-in of a module that holds another `W (d_out, d_in)`, quantized in the same way.

        Raises:
            AdapterError: the storage cannot do that.
        """
        assert self.original.store is not None
        module: nn.Module = copy_over_memory(self.original.module)
        try:
            self.original.store(module, weight)
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
        if not isinstance(x, Tensor):  # symbolic tracing knows no types
            return F.linear(x, self.effective_weight(), bias)
        compute = self.compute_dtype or x.dtype
        inside = x if x.dtype is compute else x.to(compute)
        bias = bias if bias is None or bias.dtype is compute else bias.to(compute)
        if weight is None and not torch.compiler.is_compiling():  # which chooses itself what to save
            y = RecomputedProduct(Weight(self.dequantize, compute))(inside, bias, *self.tensors.values())
        else:
            dense = self.effective_weight() if weight is None else weight
            y = F.linear(inside, dense if dense.dtype is compute else dense.to(compute), bias)
        return y if y.dtype is x.dtype or x.dtype is compute else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Return the line that `repr` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


class DequantizedEmbedding(StandIn):
    """Looks up rows of the tensors in which a quantized embedding stores its table, and dequantizes those.

    It is frozen, and is not a site, because an adapter has no table of numbers to read there.
    """

    def __init__(self, module: nn.Module, stored: StoredWeight) -> None:
        super().__init__(module, stored)
        layer: Any = module
        self.num_embeddings, self.embedding_dim = int(layer.num_embeddings), int(layer.embedding_dim)
        self.padding_idx = layer.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the ids `input`, `(..., embedding_dim)`."""
        weight, *others = self.names
        # By index, because an embedding of numbers would be a site.
        rows = [getattr(self, name) if name == "code" else getattr(self, name)[input] for name in others]
        return self.dequantize(F.embedding(input, getattr(self, weight)), *rows)

    def extra_repr(self) -> str:
        """Return the line that `repr` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind}"


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
    """Prepare `memo` such that `copy.deepcopy(model, memo)` has a stand-in for each quantized linear and embedding.

    Raises:
        ConfigError: such a module has no weight that can be read.
    """
    types = (parameter.dtype for parameter in model.parameters() if type(parameter) is nn.Parameter)
    plain = (dtype for dtype in types if dtype.is_floating_point and dtype.itemsize > 1)
    dtype = next(plain, torch.get_default_dtype())
    for module in model.modules():
        if (stored := stored_weight_of(module, dtype)) is not None:
            stand_in = DequantizedEmbedding if isinstance(module, nn.Embedding) else DequantizedLinear
            memo[id(module)] = stand_in(module, stored)


def put_decompression_aside(model: nn.Module) -> None:
    """Take hooks off `model`, a copy, that decompress weights in its first call: the copy has stand-ins."""
    for module in model.modules():
        for name in filter(None, (storage.hook for storage in STORAGES)):
            if (handle := vars(module).pop(name, None)) is not None:
                vars(module)[f"_{name}"] = hooks_of(module, FORWARD_PRE_HOOKS).pop(handle.id)


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
    for module in model.modules():
        for name in filter(None, (storage.hook for storage in STORAGES)):
            if hook := vars(module).pop(f"_{name}", None):
                vars(module)[name] = module.register_forward_pre_hook(hook)


def stand_ins(model: nn.Module) -> dict[str, DequantizedLinear]:
    """Return the stand-ins of the linears of a copy of a quantized model, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DequantizedLinear)}


def error_of(weight: Tensor, stored: DequantizedLinear) -> float:
    """Return how far a stored weight is from the exact one, as a multiple of the exact one's norm."""
    exact = weight.double()
    return float((stored.effective_weight().double() - exact).norm() / exact.norm().clamp_min(1e-300))
