"""What stands for a quantized module in a copy of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..compat.torch import FORWARD_HOOKS, HOOKS_WITH_KEYWORDS, hooks_of
from .stored_weight import copy_over_tensors


class StandIn(nn.Module):
    """Has the tensors, the hooks and the mode of a quantized module, and computes in plain sight.

    Args:
        module: the quantized module, which stays as it is. Its tensors are shared.
        tensors: those that hold its weight.
        again: makes a module like it that holds another weight; None if nothing can.
    """

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, Tensor], again: Callable[[Tensor], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            # Parameters, because those of Dynamo's inputs that are none are taken for data.
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for registry in (*FORWARD_HOOKS, *HOOKS_WITH_KEYWORDS):
            hooks_of(self, registry).update(hooks_of(module, registry))
        self.original = Original(copy_over_tensors(module), again)  # as it is now
        self.train(module.training)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by their names here."""
        return {name: getattr(self, name) for name in self.names}

    def restored(self) -> nn.Module:
        """Return a module as the quantized one was, over the same tensors."""
        module: nn.Module = copy_over_tensors(self.original.module).train(self.training)
        return module


class Original:
    """The module that a stand-in stands for, and its way to quantize. Copies of the stand-in share it."""

    def __init__(self, module: nn.Module, again: Callable[[Tensor], nn.Module] | None) -> None:
        self.module = module
        self.again = again

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        return self
