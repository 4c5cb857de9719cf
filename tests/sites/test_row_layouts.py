"""Rows that a model lays out in any way before a site: each has its own adapter there, or an error says why not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.adapters.test_switches import fill

SLOTS = 3
CFG = llfx.LoRA(r=2, target_names=(".",))


class Between(nn.Module):
    """Two linears, with layouts of rows between them."""

    def __init__(self, *layouts: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.layouts = nn.Linear(8, 8), nn.Linear(8, 8), layouts

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layout in self.layouts:
            y = layout(y)
        result: Tensor = self.last(y)
        return result


def inputs(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written(x: Tensor, write: Callable[[Tensor, Tensor], Any]) -> Tensor:
    y = torch.zeros_like(x)
    write(y, x)
    return y


def by_length(x: Tensor) -> Tensor:
    return x[:, 0, 0].argsort()


def restored(x: Tensor) -> Tensor:
    order = by_length(x)
    return x[order][order.argsort()]


def restored_by_put(x: Tensor) -> Tensor:
    order = by_length(x)
    back = torch.empty_like(order)
    back[order] = torch.arange(x.shape[0])
    return x.index_select(0, order)[back]


def of_tokens(x: Tensor) -> Tensor:
    """Sort all tokens, two copies of each, as experts do, and put them back."""
    tokens = x.reshape(-1, 8)
    keys = torch.stack([tokens[:, 0], tokens[:, 1]], 1).reshape(-1)
    order = keys.argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    picked = tokens[order // 2] * keys[order].unsqueeze(-1)
    return picked[back].view(-1, 2, 8).sum(1).view(x.shape)


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "other dimensions": lambda x: x.flip(1).roll(1, 2)[:, torch.tensor([1, 0, 1])],
    "sums of others": lambda x: x + x.cumsum(1) + x.mean((1, 2), keepdim=True) + x.softmax(1),
    "transposed": lambda x: x.transpose(0, 1).relu(),
    "transposed and back": lambda x: x.transpose(0, 1).contiguous().view(x.shape[1], -1, 8).permute(1, 0, 2),
    "joined and split": lambda x: x.reshape(-1, 8).relu().view(-1, x.shape[1], 8),
    "joined second and split": lambda x: (
        x.transpose(0, 1).reshape(-1, 8).tanh().view(x.shape[1], x.shape[0], 8).transpose(0, 1)
    ),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).transpose(1, 2).flatten(2),
    "normalized over rows": lambda x: (x - x.mean(0)) / (x.var(0, keepdim=True) + 1),
    "attention": lambda x: (x @ x.mT).softmax(-1) @ x,
    "a product of two": lambda x: torch.einsum("bij,bkj->bik", x, x) @ x,
    "a token more": lambda x: torch.cat([x.new_ones(1, 1, 8).expand(x.shape[0], -1, -1), F.pad(x, (0, 0, 1, 0))], 1),
    "each its own token": lambda x: x[torch.arange(x.shape[0]), x[:, :, 0].argmax(1)],
    "gathered tokens": lambda x: x.gather(1, x.argsort(1)),
    "written tokens": lambda x: written(x, lambda y, x: y[:, 1:].copy_(x[:, :-1])),
    "copied": lambda x: written(x, lambda y, x: y.index_copy_(1, torch.arange(x.shape[1]), x)),
    "masked": lambda x: written(x, lambda y, x: y.copy_(x).masked_fill_(x > 0, 2.0)),
    "put at a mask": lambda x: written(x, lambda y, x: y.copy_(x).__setitem__(x > 0, 2.0)),
    "sorted and put back": restored,
    "sorted and put back by numbers": restored_by_put,
    "tokens sorted and put back": of_tokens,
    "a whole slice": lambda x: x[:][:, :],
    "halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
}

REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(0),
    "flip by number": lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)],
    "roll": lambda x: x.roll(1, 0),
    "roll of all": lambda x: x.roll(8),
    "indexed by values": lambda x: x[by_length(x)],
    "index_select": lambda x: x.index_select(0, by_length(x)),
    "sorted values": lambda x: x.sort(0).values,
    "gathered rows": lambda x: x.gather(0, x.argsort(0)),
    "twice put back": lambda x: restored(x)[by_length(x)],
    "put back by another": lambda x: x[by_length(x)][(-x)[:, 0, 0].argsort().argsort()],
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeated and cut": lambda x: x.repeat_interleave(2, 0)[: x.shape[0]],
    "cat of rows": lambda x: torch.cat([x[1:], x[:1]]),
    "stack of rows": lambda x: torch.stack([x, x]).flatten(0, 1)[: x.shape[0]],
    "shifted by padding": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:-1],
    "one row for all": lambda x: x[:1].expand_as(x),
    "the mean for all": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "cumsum": lambda x: x.cumsum(0),
    "mixed": lambda x: x + x.flip(0),
    "mixed by a product": lambda x: (x[:, 0] @ x[:, 0].mT) @ x[:, 0],
    "laid out anew": lambda x: x.transpose(0, 1).reshape(x.shape),
    "taken for another": lambda x: x.reshape(x.shape[1], x.shape[0], 8),
    "joined": lambda x: x.reshape(-1, 8),
    "masked rows": lambda x: written(x, lambda y, x: y.masked_scatter_(x > 0, x)),
    "index_copy of rows": lambda x: written(x, lambda y, x: y.index_copy_(0, by_length(x), x)),
    "scattered rows": lambda x: x.scatter(0, x.argsort(0), x),
    "written over": lambda x: written(x, lambda y, x: y.copy_(x.flip(0))),
    "written over by parts": lambda x: written(x, lambda y, x: y[:, 0].copy_(x[:, 1].flip(0))),
    "written numbers": lambda x: x[torch.arange(x.shape[0]).mul_(-1).add_(x.shape[0] - 1)],
    "numbers of other rows": lambda x: x[torch.arange(x.shape[0]).flip(0)],
}


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return, for each entry of the output and each row of the input, whether the entry depends on the row."""
    y = model(x)
    changed = []
    for row in range(len(x)):
        other = x.clone()
        other[row] += 1e-7 * torch.randn(x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(row))
        changed.append(model(other) != y)
    return torch.stack(changed, -1)


def check(model: nn.Module, run: Callable[[list[int], Tensor], Tensor], x: Tensor, rows: list[int]) -> None:
    """Check that entries which depend on one row alone are as if all rows had its adapter."""
    mixed, depends = run(rows, x), rows_of(model, x)
    for row, adapter in enumerate(rows):
        alone = depends[..., row] & (depends.sum(-1) == 1)
        assert torch.allclose(mixed[alone], run([adapter] * len(x), x)[alone], rtol=1e-9, atol=1e-9)


def runs(model: nn.Module, example: Tensor) -> Iterator[Callable[[list[int], Tensor], Tensor]]:
    """Yield how a graph and a wrapper, each with a bank and with named adapters, run a batch, by slots of rows."""
    graph = llfx.capture(model, (example,))
    names: dict[int, str | None] = {-1: None, 0: "a", 2: "b"}
    for adapt in (llfx.rewrite, llfx.wrap):
        for cfg in (llfx.Bank(CFG, SLOTS), {"a": CFG, "b": CFG}):

            @functools.cache
            def adapted(adapt: Any = adapt, cfg: Any = cfg) -> Any:
                gm = adapt(graph, cfg)
                fill(gm)
                return gm

            def run(rows: list[int], x: Tensor, adapted: Any = adapted) -> Tensor:
                gm = adapted()
                chosen: Any = (
                    torch.tensor(rows) if llfx.adapters(gm)[0].name == "default" else [names[row] for row in rows]
                )
                with llfx.by_row(gm, chosen):
                    y: Tensor = gm(x)
                return y

            yield run


ROWS = [2, -1, 0]


def between(*layouts: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Between(*layouts).double()


@pytest.mark.parametrize("name", FOLLOWED)
def test_rows_that_keep_their_place_have_their_own_adapters(name: str) -> None:
    model = between(FOLLOWED[name])
    for run in runs(model, inputs(2, 5)):
        check(model, run, inputs(3, 4, seed=1), ROWS)


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_may_be_others_are_refused(name: str) -> None:
    model = between(REFUSED[name])
    for run in runs(model, inputs(2, 5)):
        with pytest.raises(llfx.AdapterError, match="The rows of the batch cannot be told at 'last'"):
            run(ROWS, inputs(3, 4, seed=1))


class Turned(nn.Module):
    """A constant that goes through a site, and then to other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(x.new_ones(1, 8).expand(x.shape[0], -1)).flip(0) + x[:, 0]
        return y


def test_a_constant_that_goes_to_other_rows_after_a_site_is_refused() -> None:
    for run in runs(Turned().double(), inputs(2, 5)):
        with pytest.raises(llfx.AdapterError, match=r"'last'.*nothing proves which row is which after .*flip"):
            run(ROWS, inputs(3, 4))


KEEPING_SHAPE = {**FOLLOWED, **REFUSED}


class Joined(nn.Module):
    """Linears of which each reads a layout of the sum of two earlier values."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.linears, self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in steps), steps

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for linear, (name, one, other) in zip(self.linears, self.steps, strict=True):
            y = values[one % len(values)] + values[other % len(values)]
            values.append(linear(KEEPING_SHAPE[name](y)))
        return values[-1]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_layouts(data: st.DataObject) -> None:
    check_layouts(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_many_layouts(data: st.DataObject) -> None:
    check_layouts(data)


def check_layouts(data: st.DataObject) -> None:
    """Check random layouts between random linears: an entry of one row has its adapter, or there is an error."""
    step = st.tuples(st.sampled_from(sorted(KEEPING_SHAPE)), st.integers(0, 3), st.integers(0, 3))
    model = Joined(data.draw(st.lists(step, min_size=1, max_size=4))).double()
    try:
        model(inputs(2, 5)), model(inputs(3, 4))
    except RuntimeError:
        return  # shapes that do not fit
    run = data.draw(st.sampled_from(list(runs(model, inputs(2, 5)))))
    with contextlib.suppress(llfx.AdapterError):
        check(model, run, inputs(3, 4, seed=1), data.draw(st.permutations(ROWS)))
