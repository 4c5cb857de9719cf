"""Models of layers in a loop, in some of which one layer of many is another one.

A capture of the first layers does not show that difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, ODD = 8, 6


class Layer(nn.Module):
    """A layer that knows its number, as those of transformers do."""

    offset: Tensor

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.scale = 2.0
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("offset", torch.ones(4))
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.up(self.norm(x) * self.scale)) + self.offset)
        return x + y * first.shape[0]


class Stack(nn.Module):
    """A model of such layers, called in a loop."""

    def __init__(self, odd: type[Layer] = Layer, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((odd if index == ODD else Layer)(index) for index in range(layers))

    def forward(self, x: Tensor) -> Any:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x


class OtherConstant(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = 3.0


class OtherDropout(Layer):
    """It differs in training only."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.dropout.p = 0.2


class OtherInEvaluation(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x, first) if self.training else super().forward(x, first) + 1


class BranchesOnIndex(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x.tanh() if self.index > 5 else x, first)


class ReadsAnother(Layer):
    """It reads the first value and not the one before."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(first, first) + 0 * x


class BranchesOnSize(Layer):
    """It differs for more rows than those of the example, which its graph must refuse."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y = super().forward(x, first)
        return y.tanh() if x.shape[0] > 100 else y


class BranchesOnFloat(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y = super().forward(x, first)
        return y.tanh() if (2 * x.shape[0]) ** 0.5 > 100 else y


class TakesNumberForSize(Layer):
    """It multiplies by 3, which is also the number of rows of the example."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.up(self.norm(x) * self.scale)) + self.offset)
        return x + y * 3


class OwnTable(Layer):
    """It reads a tensor that is neither a parameter nor a buffer."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.table = torch.ones(4)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x + self.table, first)


class EveryTable(Stack):
    """Each layer reads such a tensor, of which one has other values."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x) + layer.table
        return x


class WritesBuffer(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        self.offset.add_(1)
        return super().forward(x, first)


class OtherShape(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("offset", torch.ones(1))


class OtherDtype(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("offset", torch.ones(4, dtype=torch.int64))


class WithoutGradient(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x, first)


class Counts(Stack):
    """The model itself looks at the number of a layer."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for number, layer in enumerate(self.layers):
            x = layer(x * (2 if number == ODD else 1), first)
        return x


class CountsFromEnd(Stack):
    """Its last layer but one is another one, also if there are fewer."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for number, layer in enumerate(self.layers):
            x = layer(x.tanh() if number == len(self.layers) - 2 else x, first)
        return x


class DividesByNumber(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x / len(self.layers)


class ReadsMiddle(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        seen = []
        for layer in self.layers:
            x = layer(x, first)
            seen.append(x)
        return x + seen[4]


class ReturnsOneChanged(Stack):
    def forward(self, x: Tensor) -> list[Tensor]:
        first = x
        seen = []
        for index, layer in enumerate(self.layers):
            x = layer(x, first)
            seen.append(x + 1 if index == ODD else x)
        return seen


class Straight(torch.autograd.Function):
    """A function with the operators of a layer, and with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5.0


class Differentiates(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index, layer in enumerate(self.layers):
            x = layer(Straight.apply(x) if index == ODD else x * 2.0, first)  # type: ignore[no-untyped-call, unused-ignore]
        return x


class Backwards(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in reversed(self.layers):
            x = layer(x, first)
        return x


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(super().forward(x))
        return y


def _tied() -> Stack:
    model = Stack()
    model.layers[ODD].up.weight = model.layers[0].up.weight  # type: ignore[union-attr]
    return model


def _shared() -> Stack:
    model = Stack()
    model.layers[ODD] = model.layers[1]
    return model


def _hooked() -> Stack:
    model = Stack()
    model.layers[ODD].register_forward_hook(lambda module, args, result: result * 2)
    return model


def _other_table() -> Stack:
    model = EveryTable()
    model.layers[ODD].table = torch.ones(4)
    return model


PLANTED: dict[str, Callable[[], nn.Module]] = {
    **{
        odd.__name__: lambda odd=odd: Stack(odd)  # type: ignore[misc]
        for odd in (
            OtherConstant, OtherDropout, OtherInEvaluation, BranchesOnIndex, ReadsAnother, BranchesOnSize,
            BranchesOnFloat, TakesNumberForSize, OwnTable, WritesBuffer, OtherShape, OtherDtype, WithoutGradient,
        )
    },
    **{
        cls.__name__: cls
        for cls in (
            Counts, CountsFromEnd, DividesByNumber, ReadsMiddle, ReturnsOneChanged, Differentiates, Backwards, Twice
        )
    },
    "tied": _tied, "shared": _shared, "hooked": _hooked, "other table": _other_table,
}  # fmt: skip


class ReturnsAll(Stack):
    """A model that returns what each layer computes, the last layer first."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = x
        seen = []
        for layer in self.layers:
            x = layer(x, first)
            seen.append(x)
        return seen[::-1]


class ReturnsSome(ReturnsAll):
    def forward(self, x: Tensor) -> list[Tensor]:
        seen = super().forward(x)[::-1]
        return [*seen[::3], seen[-1]]


class CachingLayer(Layer):
    def forward(self, x: Tensor, cache: Tensor) -> Any:
        joined = torch.cat([cache, x], 1)
        return super().forward(x, x) + joined.mean(1, keepdim=True), joined


class WithCache(Stack):
    """A model whose layers each have an input and a result of their own, as caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CachingLayer(index) for index in range(LAYERS))

    def number_of_cache(self, index: int) -> int:
        return index

    def forward(self, x: Tensor, caches: list[Tensor]) -> Any:  # type: ignore[override]
        caches = [*caches]
        x = x * caches[0].shape[1]
        for index, layer in enumerate(self.layers):
            number = self.number_of_cache(index)
            x, caches[number] = layer(x, caches[number])
        return x, caches


class ReadsNeighbour(WithCache):
    def number_of_cache(self, index: int) -> int:
        return index - 1 if index == ODD else index


class ReadsBackwards(WithCache):
    def number_of_cache(self, index: int) -> int:
        return len(self.layers) - 1 - index


class Weighted(nn.Module):
    """Layers in a loop with an optional argument.

    Args:
        odd: the number of the layer that computes something else without it; None for no such layer.
    """

    def __init__(self, odd: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.odd = odd

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        first = x
        for layer in self.layers:
            y: Tensor = layer(x, first)
            without = 2 * y if layer.index == self.odd else y
            x = without if weights is None else y * weights
        return x
