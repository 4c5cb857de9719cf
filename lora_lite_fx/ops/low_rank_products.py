"""The products of low-rank adapters that read one input, with those of their sites, as one operation.

Autograd sees one node where the graph has a dozen. Branches are added into the outputs of the sites in place. In the
backward pass, all gradients of the input are added into one tensor. What is saved for it is chosen as a whole.

`LowRankProducts` is the operation, `Branch` the record that it is given for each site. torch.fx and autograd pass
tensors one by one: `flatten` and `unflatten` are the only places that know in which order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

from ..compat.torch import constant_when_compiled, is_wrapped
from ..graph.direct_calls import ORDINARY
from ..graph.tensors import HALF
from .autocast import autocast_of
from .saved_values import apart, together

_SMALLEST_SCALE = 1e-30
"""Replaces a scale of zero where the result is divided by the scale again."""

T = TypeVar("T")


class Branch(NamedTuple, Generic[T]):
    """One site and its adapter, `y = c (x W^T + b + alpha t B^T)`: its tensors, or one value for each of them.

    Args:
        weight: the frozen `W (d_out, d_in)`.
        bias: the frozen `b (d_out,)`, or None.
        b: the adapter's `B (d_out, r)`; or one for each row of the batch, `(batch, d_out, r)`.
        scale: the adapter's `c (d_out,)`, or None.
    """

    weight: T
    bias: T | None
    b: T
    scale: T | None


def flatten(branches: Iterable[Branch[T]]) -> list[T | None]:
    """Return the fields of all branches one after the other, as the operation takes them."""
    return [field for branch in branches for field in branch]


def unflatten(fields: Sequence[Any]) -> list[Branch[Any]]:
    """Return the branches whose fields `flatten` put one after the other."""
    size = len(Branch._fields)
    return [Branch(*fields[start : start + size]) for start in range(0, len(fields), size)]


@dataclass(frozen=True)
class LowRankProducts:
    """`x, a, *sources, *flatten(branches) -> t, *ys`: `t = x a^T`, and `y = c (x W^T + b + alpha t_i B^T)` per branch.

    For the backward pass it saves `t` for the gradient of a `B`; the sources of `x` if there are any, else `x`, for
    that of `a`; and for that of a `c` the result `y`, which the operations that follow may save as well. A frozen
    factor has no gradient, so that nothing is saved for it. It computes the plain products under `torch.compile`,
    which chooses what to save itself, in transforms (`torch.func`, forward mode), and where a weight is trained or is
    not an ordinary tensor.

    Args:
        ranks: how many columns of `t` each branch reads, one after the other; empty for `t` alone.
        alphas: the factor of each branch.
        recipe: `None, *sources -> (x,)`, by the operations that `x` was computed with; a method that does not use its
            object. None where `x` is saved.
        sources: how many sources there are: tensors, or sizes.
    """

    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    recipe: Callable[..., tuple[Tensor]] | None = None
    sources: int = 0

    def __post_init__(self) -> None:
        let_flops_be_counted()

    @property
    def __name__(self) -> str:
        """Return the name that torch.fx gives to calls."""
        return "low_rank_products"

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
            return _apply(self, x, a, *rest)
        # As matrices, which take less time where there are few tokens.
        shape, x = x.shape[:-1], _as_matrix(x, a)
        if a.dim() == 2 and not (x.dtype in HALF and x.device.type == "cpu"):
            results = self._of_matrix(x, a, rest)
        else:
            results = [*self.accumulated(x, a, self.split(rest)[1])]
        shaped: list[Any] = [y if y is None else y.view(*shape, y.shape[-1]) for y in results]
        return tuple(shaped)

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

    def _of_matrix(self, x: Tensor, a: Tensor, rest: Sequence[Any]) -> list[Any]:
        """Return the results for a matrix `x`, without gradients, to the bits of `accumulated`.

        A token of `generate` waits for the calls and not for the products, so this makes as few as it can.
        """
        t = F.linear(x, a)
        results: list[Any] = [t]
        parts = torch.split_with_sizes(t, self.ranks, 1) if len(self.ranks) > 1 else (t,)
        place = self.sources
        for columns, alpha in zip(parts, self.alphas, strict=False):  # without branches there is t alone
            weight, bias, b, scale = rest[place : place + 4]
            place += 4
            if weight is None:
                results.append(None)
                continue
            y = F.linear(x, weight, bias).addmm_(columns, b.t(), alpha=alpha)
            if scale is not None:
                y.mul_(scale)
            results.append(y)
        return results

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
        t = _product(x, a)
        results: list[Any] = [t]
        for branch, columns, alpha in self.with_columns(branches, t):
            if branch.weight is None:
                results.append(None)
                continue
            y = torch.add(F.linear(x, branch.weight, branch.bias), _product(columns, branch.b), alpha=alpha)
            results.append(y if branch.scale is None else (y * branch.scale).type_as(y))
        return tuple(results)

    def accumulated(self, x: Tensor, a: Tensor, branches: Sequence[Branch[Tensor]]) -> tuple[Tensor, ...]:
        """Return the results, added and scaled in place. None of them is a view, so that they may be overwritten."""
        t = _product(x, a)
        results: list[Any] = [t]
        for branch, columns, alpha in self.with_columns(branches, _as_matrix(t, a)):
            if branch.weight is None:
                results.append(None)
                continue
            y = _linear(x, branch.weight, branch.bias)
            _add_product(_as_matrix(y, a), columns, branch.b.mT, alpha)
            results.append(y if branch.scale is None else y.mul_(branch.scale))
        return tuple(results)

    def _is_usual(self, x: Tensor, a: Tensor, rest: Sequence[Any]) -> bool:
        """Return whether the sums can be formed in place, and the gradients by hand."""
        if torch.compiler.is_compiling() or (self.ranks and torch.is_autocast_enabled(x.device.type)):
            return False
        tensors = [x, a, *(tensor for tensor in rest[self.sources :] if tensor is not None)]
        dtype = x.dtype if self.ranks else None
        try:
            for tensor in tensors:
                if dtype is not None and (tensor.dtype is not dtype or type(tensor) not in ORDINARY):
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
            or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` to the same bits as `F.linear`, but never as a view.

    `F.linear` forms it as a matrix if there is a bias, and returns a view of that. Autograd allows no write in place to
    one of several views that a function returns, and a ReLU may follow that works in place.
    """
    if bias is None or x.dim() == 2 or not x.is_contiguous():
        return F.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    torch.addmm(bias, _rows(x), weight.t(), out=_rows(y))
    return y


class _Function(torch.autograd.Function):
    """The operation where gradients are computed by hand.

    Its backward pass is made of differentiable operations, so that gradients of gradients are right too.
    """

    @staticmethod
    def forward(ctx: Any, products: LowRankProducts, x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        sources, branches = products.split(rest)
        a_needed = ctx.needs_input_grad[2]
        _, needed = products.split(ctx.needs_input_grad[3:])
        # A scale that gets a gradient must not be zero, because the backward pass divides by it.
        used = [
            branch._replace(scale=_invertible(branch.scale)) if need.scale else branch
            for branch, need in zip(branches, needed, strict=True)
        ]
        results = products.accumulated(x, a, used)
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
        ctx.products = products
        ctx.autocast = autocast_of(x.device.type)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, of_t: Tensor | None, *of_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        products: LowRankProducts = ctx.products
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
            shape = (*given[0].shape[:-1], a.shape[-1])
            if of_t is None:
                rows = _as_matrix(given[0], a)
                of_t = rows.new_zeros(*rows.shape[:-1], a.shape[-2])
            else:
                of_t = _as_matrix(of_t, a).clone() if branches else _as_matrix(of_t, a)
            t = of_t if t is None else _as_matrix(t, a)  # no gradient of a B reads it then
            gradients: list[Branch[Tensor | None]] = []
            reached: list[tuple[Tensor, Tensor]] = []
            of_columns: list[Tensor] = []
            for (branch, columns, alpha), narrow, need, y, of_y in zip(
                products.with_columns(branches, t), _narrowed(of_t, products.ranks), needed, ys, of_ys, strict=True
            ):
                if of_y is None:
                    of_columns.append(narrow)
                    gradients.append(Branch(None, None, None, None))
                    continue
                of_sum, of_branch = _gradients(branch, columns, alpha, need, y, _as_matrix(of_y, a))
                of_columns.append(_add_product(narrow, of_sum, branch.b, alpha, in_place))
                gradients.append(of_branch)
                reached.append((of_sum, branch.weight))
            if branches and not in_place:
                of_t = torch.cat(of_columns, -1)
            of_a = of_t.mT @ _as_matrix(x, a) if a_needed else None
            of_x = None
            if x_needed:
                of_x = _rows(of_t @ a)
                for of_sum, weight in reached:
                    of_x = _add_product(of_x, _rows(of_sum), weight, in_place=in_place)
                of_x = of_x.view(shape)
            of_rest = [*[None] * products.sources, *flatten(gradients)]
            if not isinstance(ctx, BackwardCFunction):  # of compiled autograd, which takes no None where one is needed
                triples = zip(of_rest, rest, rest_needed, strict=True)
                of_rest = [torch.zeros_like(value) if of is None and need else of for of, value, need in triples]
        return None, of_x, of_a, *of_rest


_apply: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _gradients(
    branch: Branch[Tensor], columns: Tensor, alpha: float, need: Branch[bool], y: Any, of_y: Tensor
) -> tuple[Tensor, Branch[Tensor | None]]:
    """Return the gradient of the sum that `c` scales, and those of the branch's tensors.

    Args:
        branch, columns, alpha: of `y = c (x W^T + b + alpha t B^T)`, with the columns of `t`.
        need: which tensors need a gradient.
        y: the result; None if `c` needs no gradient.
        of_y: its gradient.
    """
    of_scale = None
    if branch.scale is not None:
        scale = _invertible(branch.scale) if need.scale else branch.scale
        of_scale = (of_y * _rows(y)).sum(0) / scale if need.scale else None
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


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return `x M^T`, with one matrix or with one for each row of the batch."""
    return F.linear(x, matrix) if matrix.dim() == 2 else torch.bmm(x, matrix.mT)


def _as_matrix(tensor: Tensor, a: Tensor) -> Tensor:
    """Return `tensor` as a matrix; as it is if there is an `a` for each row of the batch."""
    return _rows(tensor) if a.dim() == 2 else tensor


def _rows(tensor: Tensor) -> Tensor:
    """Return `tensor` as a matrix: a view, if it is the result of a product, which is contiguous."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


@functools.cache
def let_flops_be_counted() -> None:
    """Tell torch's counter of FLOPs about in-place products: before a counter is made, because it copies the formulas.

    The counter's module imports Triton, so `import lora_lite_fx` does not do this.
    """
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.aten.addmm_)(_flops_of_addition)
    register_flop_formula(torch.ops.aten.baddbmm_)(_flops_of_additions)


def _flops_of_addition(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of an in-place product for torch's counter, which knows only the other form."""
    return int(2 * left[0] * left[1] * right[1])


def _flops_of_additions(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of in-place products of the rows of a batch."""
    return int(2 * left[0] * left[1] * left[2] * right[2])


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, in_place: bool = True) -> Tensor:
    """Return `total + alpha left right`, formed in `total` unless a transform forbids that."""
    of_rows = right.dim() == 3  # a matrix for each row of the batch
    if not in_place:
        return (torch.baddbmm if of_rows else torch.addmm)(total, left, right, alpha=alpha)
    if total.dtype in HALF and total.device.type == "cpu":
        # There addmm would round the sum more than once.
        return total.add_(left @ right, alpha=alpha)
    return total.baddbmm_(left, right, alpha=alpha) if of_rows else total.addmm_(left, right, alpha=alpha)
