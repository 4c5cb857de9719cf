"""A linear with a bank of adapters: each row of the batch is computed by the adapter of its slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .expert_values import PerExpert, Routed
from .linear import Linear


@dataclass(frozen=True)
class Banked(Linear):
    """A linear whose adapter is a bank. The frozen weight is one for all slots; the adapter's tensors have a slot each.

    Its routing is `adapter_ids (batch,)`: the slot of each row of the batch, and -1 for the frozen linear alone.

    Args:
        slots: the number of adapters.
        batch: the dimension of the input and of the output that counts the rows of the batch.
    """

    slots: int = 1
    batch: int = 0

    other_ranks: ClassVar[tuple[int, ...]] = ()
    value_type: ClassVar[type] = Routed

    @property
    def routed(self) -> bool:
        return True

    def example_routing(self, x: Tensor, experts: int) -> tuple[Tensor, ...]:
        return (torch.empty(x.shape[self.batch], dtype=torch.int64, device=x.device),)

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return F.linear(x, factor)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Routed:
        return Routed(x, _Rows(self, x, *routing), routing, f"{who}, which has a bank of adapters")

    def as_in_model(self, entered: Any) -> Tensor:
        value: Tensor = entered.kind.where_it_acts(entered.value, entered.kind.x)
        return value

    def operand(self, tensor: Tensor, who: str) -> PerExpert:
        return PerExpert(tensor, f"{who}, which has a bank of adapters")

    def frozen_operand(self, matrix: Tensor, who: str) -> PerExpert:
        return self.operand(matrix[None], who)

    def result(self, y: Tensor, x: Any) -> Routed:
        x.kind.y = y
        result: Routed = x.replaced(y)
        return result

    def leave(self, y: Any) -> Tensor:
        output: Tensor = y.kind.where_it_acts(y.value, y.kind.y)
        return output


class _Rows:
    """One call of a site with a bank: how values of the rows of its batch are computed.

    Args:
        kind: the kind of the site.
        x: the input of the call.
        ids: the slot of each row.
    """

    def __init__(self, kind: Banked, x: Tensor, ids: Tensor) -> None:
        self.kind, self.x, self.ids = kind, x, ids
        self.y = x  # the output of the frozen linear, once it was called

    def times(self, x: Tensor, matrix: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
        """Return the products `x M^T` of the rows of `x`, each with the matrix of its slot in `(slots, m, d_in)`."""
        if len(matrix) == 1:  # the frozen weight, or the only slot
            return F.linear(x, matrix[0])
        batch = self.kind.batch
        if x.dim() == 3 and batch == 0:
            return torch.bmm(x, self._of_rows(matrix).mT)
        rows = x.movedim(batch, 0)
        y = torch.bmm(rows.reshape(rows.shape[0], -1, rows.shape[-1]), self._of_rows(matrix).mT)
        return y.reshape(*rows.shape[:-1], y.shape[-1]).movedim(0, batch)

    def spread(self, tensor: Tensor, x: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
        """Return `tensor (slots,)` or `(slots, d)` for each row, in the shape that meets `x` elementwise."""
        rows = tensor if len(tensor) == 1 else self._of_rows(tensor)
        return rows.view(self._beside(x, *tensor.shape[1:]))

    def where_it_acts(self, adapted: Tensor, frozen: Tensor) -> Tensor:
        """Return `adapted` in the rows that have a slot, and `frozen` in the others."""
        if adapted is frozen:
            return adapted
        return torch.where((self.ids >= 0).view(self._beside(adapted)), adapted, frozen)

    def _of_rows(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.ids.clamp_min(0))

    def _beside(self, x: Tensor, *last: int) -> list[int]:
        """Return the shape of one value for each row, or one for each row and entry, that meets `x`."""
        shape = [1] * (x.dim() - len(last)) + list(last)
        shape[self.kind.batch] = -1
        return shape
