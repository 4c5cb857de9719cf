"""The gradients of `LowRankProducts` by hand: all gradients of the input are added into one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..compat.torch import is_wrapped
from .low_rank_branch import Branch, add_product, as_matrix, as_rows, flatten
from .saved_values import apart, autocast_of, together

_SMALLEST_SCALE = 1e-30
"""Replaces a scale of zero where the result is divided by the scale again."""


class _Function(torch.autograd.Function):
    """The operation `products`, a `LowRankProducts`, with gradients that are computed by hand.

    Its backward pass is made of differentiable operations, so that gradients of gradients are right too.
    """

    @staticmethod
    def forward(ctx: Any, products: Any, x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        sources, branches = products.split(rest)
        a_needed = ctx.needs_input_grad[2]
        _, needed = products.split(ctx.needs_input_grad[3:])
        # A scale that gets a gradient must not be zero, because the backward pass divides by it.
        used = [
            branch._replace(scale=_invertible(branch.scale)) if need.scale else branch
            for branch, need in zip(branches, needed, strict=True)
        ]
        results: tuple[Tensor, ...] = products.accumulated(x, a, used)
        t, *ys = results
        kept = sources if a_needed else [None] * len(sources)
        saved, ctx.others = apart([*kept, *flatten(branches)])
        ctx.save_for_backward(
            a,
            x if a_needed and products.recipe is None else None,
            t if any(need.b for need in needed) else None,
            *(y if need.scale else None for y, need in zip(ys, needed, strict=True)),
            *saved,
        )
        ctx.products, ctx.dtype = products, x.dtype
        ctx.autocast = autocast_of(x.device.type)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, of_t: Tensor | None, *of_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        products = ctx.products
        given = [gradient for gradient in (of_t, *of_ys) if gradient is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        a, x, t, *saved = ctx.saved_tensors  # which can be read only once
        ys, saved = saved[: len(products.ranks)], saved[len(products.ranks) :]
        rest = together(saved, ctx.others)
        sources, branches = products.split(rest)
        _, x_needed, a_needed, *rest_needed = ctx.needs_input_grad
        _, needed = products.split(rest_needed)
        with torch.autocast(**ctx.autocast):
            if products.recipe and a_needed:
                (x,) = products.recipe(None, *sources)
            in_place = torch.compiler.is_compiling() or not is_wrapped(*given)
            if of_t is None:
                rows = as_matrix(given[0], a)
                of_t = a.new_zeros(*rows.shape[:-1], a.shape[-2])
            else:
                of_t = as_matrix(of_t, a).clone() if branches else as_matrix(of_t, a)
            t = of_t if t is None else as_matrix(t, a)  # no gradient of a B reads it then
            values = zip(products.with_columns(branches, t), needed, ys, of_ys, strict=True)
            of_t, of_sums, gradients = _through_branches(values, of_t, products.ranks, in_place)
            of_a = of_t.mT @ as_matrix(x, a).to(of_t.dtype) if a_needed else None
            of_x = None
            if x_needed:
                of_x = as_rows(of_t @ a).to(ctx.dtype)
                for of_sum, branch in zip(of_sums, branches, strict=True):
                    if of_sum is not None:
                        of_x = add_product(of_x, as_rows(of_sum), branch.weight, in_place=in_place)
                of_x = of_x.view(*given[0].shape[:-1], a.shape[-1])
            of_rest = [*[None] * products.sources, *flatten(gradients)]
            if not isinstance(ctx, BackwardCFunction):  # of compiled autograd, which takes no None where one is needed
                triples = zip(of_rest, rest, rest_needed, strict=True)
                of_rest = [torch.zeros_like(value) if of is None and need else of for of, value, need in triples]
        return None, of_x, of_a, *of_rest


apply_with_gradients: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _through_branches(
    values: Iterable[tuple[Any, ...]], of_t: Tensor, ranks: Sequence[int], in_place: bool
) -> tuple[Tensor, list[Tensor | None], list[Branch[Tensor | None]]]:
    """Add the gradients that reach `t` through the branches to that of `t`.

    Args:
        values: for each branch: it, its columns of `t` and its alpha; which of its tensors need a gradient; its result,
            and the gradient of that, or None.
        of_t: the gradient of `t`, which is added to if `in_place`.
        ranks: of the branches.
        in_place: whether that may be done.

    Returns:
        The sum; for each branch the gradient of the sum that `c` scales, or None; and those of its tensors.
    """
    of_columns, of_sums, gradients = [], [], []
    for narrow, ((branch, columns, alpha), need, y, of_y) in zip(_narrowed(of_t, ranks), values, strict=True):
        of_sum: Tensor | None = None
        of_branch: Branch[Any] = Branch(None, None, None, None)  # Dynamo follows no call of `Branch[Any]`
        if of_y is not None:
            of_sum = as_matrix(of_y, branch.b)
            of_wide, of_branch = _gradients(branch, columns, alpha, need, y, of_sum.to(branch.b.dtype))
            narrow = add_product(narrow, of_wide, branch.b, alpha, in_place)
            of_sum = of_sum if branch.scale is None else of_wide.to(of_y.dtype)
        of_columns.append(narrow)
        of_sums.append(of_sum)
        gradients.append(of_branch)
    return torch.cat(of_columns, -1) if ranks and not in_place else of_t, of_sums, gradients


def _gradients(
    branch: Branch[Tensor], columns: Tensor, alpha: float, need: Branch[bool], y: Any, of_y: Tensor
) -> tuple[Tensor, Branch[Tensor | None]]:
    """Return the gradient of the sum that `c` scales, and those of the branch's tensors.

    Args:
        branch, columns, alpha: of `y = c (x W^T + b + alpha t B^T)`, with the columns of `t`.
        need: which tensors need a gradient.
        y: the result; None if `c` needs no gradient.
        of_y: its gradient, in the type of the adapter.
    """
    of_scale = None
    if branch.scale is not None:
        scale = _invertible(branch.scale) if need.scale else branch.scale
        of_scale = (of_y * as_rows(y)).sum(0) / scale if need.scale else None
        of_y = of_y * scale
    # The narrow matrix first: the other way round it takes up to twice the time.
    of_b = alpha * (columns.mT @ of_y).mT if need.b else None
    return of_y, Branch(None, None, of_b, of_scale)


def _narrowed(tensor: Tensor, widths: Sequence[int]) -> Iterator[Tensor]:
    """Yield views of these widths of the columns of `tensor`, each to be written to."""
    for start, width in zip(itertools.accumulate(widths, initial=0), widths, strict=False):
        yield tensor.narrow(-1, start, width)


def _invertible(scale: Any) -> Tensor:
    return torch.where(scale == 0, _SMALLEST_SCALE, scale)
