"""The products of a bank inside a scope that says the rows: factors of each row, or rows sorted by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.tensors import HALF
from .low_rank_branch import flatten, unflatten
from .low_rank_products import LowRankProducts

_MOST_ROWS = 4
"""Factors are selected for each row as long as there are at most this many rows for each slot: else they are a copy of
the bank many times over, and reading them takes more time than sorting the rows."""

_FEWEST_TOKENS = 8
"""With this many tokens in a row, products with a factor of its own are as quick as those of sorted rows."""


def rows_or_slots(stack: Tensor, ids: Tensor) -> Tensor:
    """Return the factors of the rows, laid out as products read them; or those of the slots, if there are many rows.

    Args:
        stack: a factor of each slot, `(slots, m, n)`.
        ids: the slot of each row, `(batch,)`; a row of -1 has a factor of zeros.
    """
    if len(ids) > _MOST_ROWS * len(stack):
        return stack
    return _rows(stack, ids).mT.contiguous().mT


def _rows(stack: Tensor, ids: Tensor) -> Tensor:
    return torch.where((ids >= 0)[:, None, None], stack.index_select(0, ids.clamp_min(0)), 0.0)


@dataclass(frozen=True)
class BankProducts:
    """`x, a, ids, *flatten(branches) -> t, *ys`, as `LowRankProducts`, with factors that `rows_or_slots` returned.

    Without gradients it multiplies rows that are sorted by slot with the factors of the slots, if there are more rows
    than factors of their own are worth, and few tokens in each. The shapes alone decide.

    Args:
        products: the products of factors of rows.
    """

    __name__ = "bank_products"  # as torch.fx names its calls
    is_repeatable: ClassVar[bool] = True

    products: LowRankProducts

    def __call__(self, x: Tensor, a: Tensor, ids: Tensor, *fields: Any) -> tuple[Tensor, ...]:
        """Return `t`, whose rows may be in another order, and the result of each branch.

        Args:
            x: `(batch, tokens, d_in)`.
            a: `(batch, r, d_in)`, or `(slots, r, d_in)`.
            ids: the slot of each row, `(batch,)`.
            fields: the branches as `flatten` returns them; each `b` is `(batch, d_out, r)` or `(slots, d_out, r)`.
        """
        if len(a) == len(ids):
            return self.products(x, a, *fields)
        branches = unflatten(fields)
        if torch.is_grad_enabled() or x.shape[1] >= _FEWEST_TOKENS or a.dtype not in (torch.float32, *HALF):
            own = [branch._replace(b=_rows(branch.b, ids)) for branch in branches]
            return self.products(x, _rows(a, ids), *flatten(own))
        return self._sorted(x, a, ids, *fields)

    def _sorted(self, x: Tensor, a: Tensor, ids: Tensor, *fields: Any) -> tuple[Tensor, ...]:
        batch, tokens, width = x.shape
        slots = ids.clamp_min(0)
        order = slots.argsort()
        ends = tokens * (slots[:, None] == torch.arange(len(a), device=ids.device)).sum(0).cumsum(0).int()
        acts = (ids >= 0).index_select(0, order).repeat_interleave(tokens)[:, None]
        t = F.grouped_mm(x.index_select(0, order).view(-1, width).to(a.dtype), a.mT, offs=ends)
        results = [t]
        for branch, columns, alpha in self.products.with_columns(unflatten(fields), t):
            z = torch.where(acts, F.grouped_mm(columns.contiguous(), branch.b.mT, offs=ends), 0.0)
            y = F.linear(x, branch.weight, branch.bias)
            wide = torch.promote_types(y.dtype, z.dtype)  # so that the sum is rounded once
            total = y.to(wide).index_add(0, order, z.to(wide).view(batch, tokens, -1), alpha=alpha)
            results.append(total.to(y.dtype))
        return tuple(results)
