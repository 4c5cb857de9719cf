"""Trials of kind "rows": nets that reorder, drop, repeat or fold the rows of a batch, with an adapter for each row.

The oracle computes each layer with the adapter of the row that each vector comes from: the numbers of the rows go
through the same layout operations as the vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.fuzz.blocks import WIDTH
from tests.fuzz.verdict import require_close, the_oracle
from tests.support.conformance import randomise

TIME = 3
LORA = llfx.LoRA(r=2, alpha=3.0, target_names=".")
SCALE = 1.5
BASE = 2
"""The choice of rows that have no adapter."""


def _by_length(x: Tensor) -> Tensor:
    return torch.argsort(x.flatten(1)[:, 0])


def _like(order: Tensor, x: Tensor) -> Tensor:
    return order.view(-1, *[1] * (x.dim() - 1)).expand(-1, *x.shape[1:])


Layout = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "flip": lambda x, order, by: x.flip(0),
    "roll": lambda x, order, by: x.roll(1, 0),
    "index by numbers": lambda x, order, by: x[[1, 0, 2]],
    "index by values": lambda x, order, by: x[order],
    "index_select": lambda x, order, by: x.index_select(0, order),
    "sort by length": lambda x, order, by: x[_by_length(by)],
    "sorted and back": lambda x, order, by: x[order][torch.argsort(order)],
    "every second": lambda x, order, by: x[::2],
    "without the first": lambda x, order, by: x[1:],
    "repeat_interleave": lambda x, order, by: x.repeat_interleave(2, 0),
    "twice": lambda x, order, by: torch.cat([x, x], 0),
    "expand": lambda x, order, by: x[None].expand(2, *x.shape).flatten(0, 1),
    "halves swapped": lambda x, order, by: torch.cat(x.chunk(2)[::-1], 0),
    "time first": lambda x, order, by: x.transpose(0, 1).contiguous(),
    "packed": lambda x, order, by: x.flatten(0, 1),
    "packed by time": lambda x, order, by: x.transpose(0, 1).flatten(0, 1),
    "gather": lambda x, order, by: x.gather(0, _like(order, x)),
    "where": lambda x, order, by: torch.where(_like(order, x) >= 0, x, x.flip(0)),
}
"""Layout operations of a tensor `(batch, time, ...)`. `order` is an argument of the model; `by` are the vectors."""


class Layouts(nn.Module):
    """Linears with layout operations between them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(len(names) + 1))

    def forward(self, x: Tensor, order: Tensor) -> Any:
        for name, linear in zip(self.names, self.linears, strict=False):
            x = torch.tanh(linear(x))
            x = LAYOUTS[name](x, order, x)
        return self.linears[-1](x)


@dataclass(frozen=True)
class Rows:
    """A net, and how each row gets its adapter.

    Args:
        layouts: what is done to the rows, between two linears each.
        rows: how many.
        how: "by_row", "scaled" or "bank".
        path: "rewrite", "traced" or "wrap".
        seed: of the inputs, and of which adapter each row has.
    """

    layouts: tuple[str, ...]
    rows: int = 4
    how: str = "by_row"
    path: str = "rewrite"
    seed: int = 0

    def features(self) -> frozenset[str]:
        return frozenset({*self.layouts, self.how, self.path}) - {"by_row", "rewrite"}

    def check(self) -> None:
        torch.manual_seed(2)
        model: Any = Layouts(self.layouts).double().eval()
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.rows, TIME, WIDTH, generator=generator, dtype=torch.float64)
        order = torch.randperm(self.rows, generator=generator)
        chosen = torch.randint(0, BASE + 1, (self.rows,), generator=generator)
        with the_oracle():
            model(x, order)
        example = None if self.path == "traced" else (torch.cat([x, x]), torch.cat([order, order + self.rows]))
        config: Any = llfx.Bank(LORA, slots=2) if self.how == "bank" else {"a": LORA, "b": LORA}
        adapted: Any = (llfx.wrap if self.path == "wrap" else llfx.rewrite)(model, config, example)
        randomise(adapted, 0)
        with torch.no_grad():
            with the_oracle():
                expected = self._expected(model, llfx.adapter_state_dict(adapted), x, order, chosen)
            with self._scope(adapted, chosen):
                actual = adapted(x, order)
        require_close(actual, expected, 1e-9, "output of rows")

    def _scope(self, adapted: Any, chosen: Tensor) -> Any:
        if self.how == "scaled":
            return llfx.scaled(adapted, {name: (chosen == i).double() for i, name in enumerate("ab")})
        if self.how == "bank":
            return llfx.by_row(adapted, torch.where(chosen == BASE, -1, chosen))
        return llfx.by_row(adapted, [("a", "b", None)[i] for i in chosen.tolist()])

    def _expected(self, model: Any, values: dict[str, Tensor], x: Tensor, order: Tensor, chosen: Tensor) -> Tensor:
        rows = torch.arange(self.rows)[:, None].expand(self.rows, TIME)
        for i, linear in enumerate(model.linears):
            y = linear(x)
            for slot in range(BASE):
                ending = "" if self.how == "bank" else f"_{'ab'[slot]}"
                a, b = (values[f"linears.{i}.lora_{factor}{ending}"] for factor in "AB")
                a, b = (a[slot], b[slot]) if self.how == "bank" else (a, b)
                y = y + (chosen[rows] == slot)[..., None] * (SCALE * x @ a.T @ b.T)
            x = y
            if i < len(self.layouts):
                x = torch.tanh(y)
                x, rows = (LAYOUTS[self.layouts[i]](value, order, x) for value in (x, rows))
        return x


@st.composite
def rows(draw: Any) -> Rows:
    """Draw a trial."""
    layouts = draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=2))
    how = draw(st.sampled_from(["by_row", "scaled", "bank"]))
    path = draw(st.sampled_from(["rewrite", "traced", "wrap"]))
    return Rows(tuple(layouts), draw(st.sampled_from([4, 6])), how, path, draw(st.integers(0, 9)))
