"""The products of low-rank adapters that read one input, with those of their sites, as one operation.

Autograd sees one node where the graph has a dozen. Branches are added into the outputs of the sites in place. In the
backward pass, all gradients of the input are added into one tensor. What is saved for it is chosen as a whole.

`LowRankProducts` is the operation, `Branch` the record that it is given for each site. torch.fx and autograd pass
tensors one by one: `flatten` and `unflatten` are the only places that know in which order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..compat.torch import constant_when_compiled
from ..graph.direct_calls import is_ordinary
from .low_rank_branch import Branch, add_product, adds_in_one_call, as_matrix, as_rows, flatten, unflatten
from .low_rank_gradients import apply_with_gradients
from .saved_values import Recomputing


@dataclass(frozen=True)
class LowRankProducts(Recomputing):
    """`x, a, *sources, *flatten(branches) -> t, *ys`: `t = x a^T`, and `y = c (x W^T + b + alpha t_i B^T)` per branch.

    The adapter's tensors may be wider than those of the base, such as float32 beside bfloat16. Then `x` is cast for
    `t`, and the sum is rounded once, to the type of the base.

    For the backward pass it saves `t` for the gradient of a `B`; the sources of `x` if there are any, else `x`, for
    that of `a`; and for that of a `c` the result `y`, which the operations that follow may save as well. A frozen
    factor has no gradient, so that nothing is saved for it. It computes the plain products under `torch.compile`,
    which chooses what to save itself, in transforms (`torch.func`, forward mode), and where a weight is trained or is
    not an ordinary tensor.

    Args:
        ranks: how many columns of `t` each branch reads, one after the other; empty for `t` alone.
        alphas: the factor of each branch.
        recipe, sources: see `Recomputing`.
    """

    __name__ = "low_rank_products"  # as torch.fx names its calls
    is_repeatable: ClassVar[bool] = True
    results_are_apart: ClassVar[bool] = True
    """Each result can be computed without the others, by `without_unread`."""

    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        let_flops_be_counted()

    def __call__(self, x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Return `t` and the result of each branch.

        Args:
            x: `(..., d_in)`.
            a: `(r, d_in)`, where r is the sum of the ranks; or one for each row of the batch, `(batch, r, d_in)`, for
                an `x (batch, tokens, d_in)`.
            rest: the sources, and the branches as `flatten` returns them. Without gradients a branch may have no
                tensors: its result is None.
        """
        if not self._is_usual(x, a, rest):
            return self._plain(x, a, self.split(rest)[1])
        if torch.is_grad_enabled():
            return apply_with_gradients(self, x, a, *rest)
        return self._shared(x, a, rest) if a.dim() == 2 else self.accumulated(x, a, self.split(rest)[1])

    def split(self, rest: Sequence[Any]) -> tuple[Sequence[Any], list[Branch[Any]]]:
        """Return the sources and the branches, of what follows `x` and `a` among the arguments."""
        return rest[: self.sources], unflatten(rest[self.sources :])

    def with_columns(
        self, branches: Sequence[Branch[Tensor]], t: Tensor
    ) -> Iterator[tuple[Branch[Tensor], Tensor, float]]:
        """Yield each branch with its columns of `t` and its alpha."""
        ranks, alphas = self._numbers()
        return zip(branches, t.split(ranks, -1) if ranks else (), alphas, strict=True)

    # Else torch.compile, asked for dynamic sizes, takes each number for an input and compiles anew to learn that it is
    # a constant: 44 s in place of 9 s for a layer with 21 of them.
    @constant_when_compiled
    def _numbers(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return self.ranks, self.alphas

    def _shared(self, x: Tensor, a: Tensor, rest: Sequence[Any]) -> tuple[Any, ...]:
        """Return the results for one `a (r, d_in)`, without gradients, to the bits of `accumulated`.

        A token of `generate` waits for the calls and not for the products, so this makes as few as it can.
        """
        shape = x.shape[:-1]
        is_one_call = adds_in_one_call(x, a)
        if is_one_call:
            x = as_rows(x)  # as matrices, which take less time where there are few tokens
        t = self._narrow(x, a)
        results: list[Any] = [t]
        parts = torch.split_with_sizes(t, self.ranks, -1) if len(self.ranks) > 1 else (t,)
        place = self.sources
        for columns, alpha in zip(parts, self.alphas, strict=False):  # without branches there is t alone
            weight, bias, b, scale = rest[place : place + 4]
            place += 4
            if weight is None:
                results.append(None)
                continue
            y = F.linear(x, weight, bias)
            if not is_one_call:
                add_product(y, columns, b.t(), alpha, scale=scale)
            else:
                y.addmm_(columns, b.t(), alpha=alpha)
                if scale is not None:
                    y.mul_(scale)
            results.append(y)
        if not is_one_call:
            return tuple(results)
        return tuple([y if y is None else y.view(*shape, y.shape[-1]) for y in results])

    def without_unread(self, args: Sequence[Any], read: Container[int]) -> tuple[Any, ...]:
        """Return the arguments of a call whose branches have no tensors if nothing reads their results.

        Args:
            args: the arguments of a call that computes no gradients.
            read: the places of the results that are read.
        """
        x, a, *rest = args
        sources, branches = self.split(rest)
        kept = [branch if i in read else Branch(None, None, None, None) for i, branch in enumerate(branches, 1)]
        return x, a, *sources, *flatten(kept)

    def _plain(self, x: Tensor, a: Tensor, branches: Sequence[Branch[Tensor]]) -> tuple[Tensor, ...]:
        t = self._narrow(x, a)
        results: list[Any] = [t]
        for branch, columns, alpha in self.with_columns(branches, t):
            if branch.weight is None:
                results.append(None)
                continue
            y = F.linear(x, branch.weight, branch.bias)
            total = torch.add(y, _product(columns, branch.b), alpha=alpha)
            results.append((total if branch.scale is None else total * branch.scale).type_as(y))
        return tuple(results)

    def accumulated(self, x: Tensor, a: Tensor, branches: Sequence[Branch[Tensor]]) -> tuple[Tensor, ...]:
        """Return the results, added and scaled in place. None of them is a view, so that they may be overwritten."""
        t = self._narrow(x, a)
        results: list[Any] = [t]
        for branch, columns, alpha in self.with_columns(branches, as_matrix(t, a)):
            if branch.weight is None:
                results.append(None)
                continue
            y = _linear(x, branch.weight, branch.bias)
            add_product(as_matrix(y, a), columns, branch.b.mT, alpha, scale=branch.scale)
            results.append(y)
        return tuple(results)

    def _narrow(self, x: Tensor, a: Tensor) -> Tensor:
        """Return `t`. Without branches the graph has cast `x` already; autocast casts both."""
        casts = self.ranks and x.dtype is not a.dtype and not torch.is_autocast_enabled(x.device.type)
        return _product(x.to(a.dtype) if casts else x, a)

    def _is_usual(self, x: Tensor, a: Tensor, rest: Sequence[Any]) -> bool:
        """Return whether the sums can be formed in place, and the gradients by hand."""
        if torch.compiler.is_compiling() or (self.ranks and torch.is_autocast_enabled(x.device.type)):
            return False
        base, adapter = x.dtype, a.dtype
        if self.ranks and base is not adapter and torch.promote_types(base, adapter) is not adapter:
            return False
        dtypes = itertools.chain((base, adapter), itertools.cycle(Branch(base, base, adapter, adapter)))
        tensors = (x, a, *rest[self.sources :])
        try:
            for tensor, dtype in zip(tensors, dtypes, strict=False):
                if tensor is None:
                    continue
                if self.ranks and (tensor.dtype is not dtype or not is_ordinary(tensor)):
                    return False
                tensor.data_ptr()
        except RuntimeError:  # a transform of `torch.func` wraps a tensor in one that has no memory of its own
            return False
        if not torch.is_grad_enabled():
            return True
        _, branches = self.split(rest)
        frozen = (tensor for branch in branches for tensor in (branch.weight, branch.bias) if tensor is not None)
        return not (
            any(tensor.requires_grad for tensor in frozen)
            or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None)
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` to the same bits as `F.linear`, but never as a view.

    `F.linear` forms it as a matrix if there is a bias, and returns a view of that. Autograd allows no write in place to
    one of several views that a function returns, and a ReLU may follow that works in place.
    """
    if bias is None or x.dim() == 2 or not x.is_contiguous():
        return F.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    torch.addmm(bias, as_rows(x), weight.t(), out=as_rows(y))
    return y


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return `x M^T`, with one matrix or with one for each row of the batch."""
    return F.linear(x, matrix) if matrix.dim() == 2 else torch.bmm(x, matrix.mT)


@functools.cache
def let_flops_be_counted() -> None:
    """Tell torch's counter of FLOPs about in-place products: before a counter is made, because it copies the formulas.

    The counter's module imports Triton, so `import lora_lite_fx` does not do this.
    """
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula([torch.ops.aten.addmm_, torch.ops.aten.baddbmm_])(_flops_of_addition)


def _flops_of_addition(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of an in-place product, or of one for each row of a batch, by the shapes of the factors."""
    return int(2 * math.prod(left) * right[-1])
