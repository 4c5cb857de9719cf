"""Layouts of a batch `(rows, tokens, 8)`, with rows that keep their place, and with rows that may be others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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


@torch.library.custom_op("row_layouts::clone", mutates_args=())
def foreign_clone(x: Tensor) -> Tensor:
    """Return the rows in another order, under the name of an operator that keeps it."""
    return x.flip(0)


@foreign_clone.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def put(order: Tensor, numbers: Tensor) -> Tensor:
    places = torch.empty_like(order)
    places[order] = numbers
    return places


def put_back(x: Tensor, places: Callable[[Tensor], Tensor]) -> Tensor:
    order = by_length(x)
    return x[order][places(order)]


def halves_put_back(x: Tensor) -> Tensor:
    twice = x[:, 0].repeat_interleave(2, 0)
    order = twice[:, 0].argsort()
    back = twice[order].view(-1, 2, 8)[:, 0][(order // 2).argsort()]
    return x + back.view(-1, 2, 8)[:, :1]


def sorted_twice(x: Tensor) -> Tensor:
    again = x[by_length(x)][:, 1, 0].sort()
    return x + again.values[again.indices.argsort()][:, None, None]


def zeroed(numbers: Tensor) -> Tensor:
    numbers.view(-1).zero_()
    return numbers


def of_all(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


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
    "less than the largest": lambda x: x - x.max(),
    "copies of all": lambda x: x.repeat(2, 1, 1).view(2, -1, x.shape[1], 8).sum(0),
    "copies of each": lambda x: x.repeat_interleave(2, 0).view(-1, 2, x.shape[1], 8).sum(1),
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
    "the mean for all": lambda x: x.mean(0, keepdim=True).tanh().expand_as(x),
    "the sum for all": lambda x: torch.einsum("bij->ij", x)[None].expand_as(x),
    "the first ones": lambda x: x[torch.tensor([1, 0])],
    "numbers in another order": lambda x: (
        x.transpose(0, 1).reshape(-1, 8)[torch.arange(x[..., 0].numel())].view(x.shape)
    ),
    "put back the other way": lambda x: put_back(x, lambda order: order.argsort(descending=True)),
    "put back by halves": lambda x: put_back(x, lambda order: (order // 2).argsort()),
    "put back by other numbers": lambda x: put_back(x, lambda order: put(order, torch.zeros_like(order))),
    "put where other rows say": lambda x: written(
        x, lambda y, x: y.copy_(x).__setitem__((slice(None), x[:, 0, 0].gt(0).long()), 0.0)
    ),
    "sorted twice": sorted_twice,
    "in two orders": lambda x: x + x[by_length(x)],
    "joined in two ways": lambda x: (x.reshape(-1, 8) + x.transpose(0, 1).reshape(-1, 8)).view(x.shape),
    "repeated by values": lambda x: x.repeat_interleave(by_length(x) * 0 + 1, 0, output_size=x.shape[0]),
    "repeat_interleave of all": lambda x: x.repeat_interleave(2).view(-1, 8),
    "shifted by padding both ways": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "pooled": lambda x: F.avg_pool1d(x.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1),
    "attention of rows": lambda x: of_all(x.transpose(0, 1)).transpose(0, 1),
    "a product by einsum": lambda x: torch.einsum("bi,ci->bc", x[:, 0], x[:, 0]) @ x[:, 0],
    "a foreign operator": lambda x: foreign_clone(x),
    "zeroed numbers": lambda x: x[zeroed(torch.arange(x.shape[0]))],
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


def put_at_mask(x: Tensor) -> Tensor:
    y = x[:, :, 0].clone()
    y[y > 0] = x[:, 0, 0]
    return x + y[:, :, None]


def summed_up(order: Tensor) -> Tensor:
    return torch.ones_like(order).index_put((order,), torch.arange(order.shape[0]), accumulate=True)


PARTIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers of parts": lambda x: x[torch.arange(2 * x.shape[0]).view(-1, 2)],
    "put at a mask": put_at_mask,
    "put by sums": lambda x: put_back(x, summed_up),
    "put at halves": lambda x: put_back(x, lambda order: put(order // 2, torch.arange(order.shape[0]))),
    "halves put back": halves_put_back,
}
"""Layouts that run for some values alone, if for any."""
