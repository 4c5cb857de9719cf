"""The products of low-rank adapters that read one input, with those of their sites, as one operation.

Autograd sees one node where the graph has a dozen: branches are added into the outputs of the sites in place, in the
backward pass all gradients of the input into one tensor, and what is kept for it is chosen as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..graph.tensors import HALF

_SMALLEST_SCALE = 1e-30
"""What a scale of zero is taken for where the result is divided by it again."""


class Branch(NamedTuple):
    """A frozen linear and its branch, `y = c (x W^T + b + alpha t B^T)`: `weight`, `bias`, `b` and `scale` of it."""

    weight: Tensor
    bias: Tensor | None
    b: Tensor
    scale: Tensor | None


_EACH = len(Branch._fields)


@dataclass(frozen=True, eq=False)
class LowRankProducts:
    """`x, a, *sources, *sites -> t, *ys` with `t = x a^T` and, for each site, `y = c (x W^T + b + alpha t_i B_i^T)`.

    For the backward pass it keeps `t`, of `x` its sources alone if there are any, and for the gradient of a `c` the
    result `y`, which what follows may keep as well. Under `torch.compile`, which chooses what to keep itself, in
    transforms (`torch.func`, forward mode), and where a weight is trained or is no ordinary tensor, it is the plain
    products.

    Args:
        ranks: how many columns of `t` each site reads, one after the other.
        alphas: of the sites. Their tensors follow the sources, four for each: `W (d_out, d_in)`, `b (d_out,)` or None,
            `B (d_out, r)`, `c (d_out,)` or None.
        recipe: `None, *sources -> (x,)`, by the operations that `x` was computed with; a method that does not use its
            object.
        sources: how many there are.
    """

    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    recipe: Callable[..., tuple[Tensor]] | None = None
    sources: int = 0

    @property
    def __name__(self) -> str:
        """As torch.fx names the functions that it calls."""
        return "low_rank_products"

    def __call__(self, x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        tensors = rest[self.sources :]
        if not self._is_usual(x, a, tensors):
            return self._plain(x, a, tensors)
        if torch.is_grad_enabled():
            results: tuple[Tensor, ...] = _Function.apply(self, x, a, *rest)
            return results
        # As matrices, which take less time where there are few tokens.
        shape = x.shape[:-1]
        return tuple(result.view(*shape, result.shape[-1]) for result in self.accumulated(_rows(x), a, tensors))

    def each(self, t: Tensor, tensors: Sequence[Any]) -> Iterator[tuple[Branch, Tensor, float]]:
        """The sites that `tensors` are of, with their columns of `t` and their alphas."""
        if not self.ranks:
            return iter(())
        sites = (Branch(*tensors[index : index + _EACH]) for index in range(0, len(tensors), _EACH))
        return zip(sites, t.split(self.ranks, -1), self.alphas, strict=True)

    def _plain(self, x: Tensor, a: Tensor, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
        t = F.linear(x, a)
        results = [t]
        for site, part, alpha in self.each(t, tensors):
            y = torch.add(F.linear(x, site.weight, site.bias), F.linear(part, site.b), alpha=alpha)
            results.append(y if site.scale is None else (y * site.scale).type_as(y))
        return tuple(results)

    def accumulated(self, x: Tensor, a: Tensor, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
        """The results, branches added and scaled in place. None is a view: what follows may overwrite them."""
        t = F.linear(x, a)
        results = [t]
        for site, part, alpha in self.each(_rows(t), tensors):
            y = F.linear(x, site.weight, site.bias)
            _add_product(_rows(y), part, site.b.t(), alpha)
            results.append(y if site.scale is None else y.mul_(site.scale))
        return tuple(results)

    def _is_usual(self, x: Tensor, a: Tensor, tensors: Sequence[Tensor | None]) -> bool:
        """Whether tensors are such that the sums can be formed in place, and the gradients by hand."""
        if torch.compiler.is_compiling() or (self.ranks and torch.is_autocast_enabled(x.device.type)):
            return False
        given = [x, a, *(tensor for tensor in tensors if tensor is not None)]
        dtype = x.dtype if self.ranks else None
        try:
            for tensor in given:
                if dtype is not None and (tensor.dtype is not dtype or type(tensor) not in _ORDINARY):
                    return False
                tensor.data_ptr()
        except RuntimeError:  # a transform of `torch.func` sees more in a tensor than there is
            return False
        frozen = (tensor for index, tensor in enumerate(tensors) if index % _EACH < 2 and tensor is not None)
        return not torch.is_grad_enabled() or not (
            any(tensor.requires_grad for tensor in frozen)
            or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)
        )


_ORDINARY = (Tensor, nn.Parameter)


class _Function(torch.autograd.Function):
    """Its backward pass is made of differentiable operations, so that gradients of gradients are right too."""

    @staticmethod
    def forward(ctx: Any, products: LowRankProducts, x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        sources, tensors = rest[: products.sources], rest[products.sources :]
        scaled = [ctx.needs_input_grad[3 + products.sources + place] for place in _scale_places(tensors)]
        # What is divided by again must not be zero.
        used = list(tensors)
        for place, needed in zip(_scale_places(tensors), scaled, strict=True):
            used[place] = _invertible(used[place]) if needed else used[place]
        results = products.accumulated(x, a, used) if tensors else (F.linear(x, a),)
        ys = [y if needed else None for y, needed in zip(results[1:], scaled, strict=True)]
        values = (a, results[0] if tensors else None, *(sources if products.recipe else (x,)), *tensors, *ys)
        ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))
        ctx.others = {index: value for index, value in enumerate(values) if not isinstance(value, Tensor)}
        ctx.products = products
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, of_t: Tensor | None, *of_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        products: LowRankProducts = ctx.products
        saved = list(ctx.saved_tensors)  # which may be asked for only once
        for index, value in ctx.others.items():
            saved.insert(index, value)
        a, t, *values = saved
        kept = products.sources if products.recipe else 1
        places = kept + _EACH * len(products.ranks)
        sources, tensors, ys = values[:kept], values[kept:places], values[places:]
        _, x_needed, a_needed, *rest_needed = ctx.needs_input_grad
        of_rest: list[Tensor | None] = [None] * len(rest_needed)
        with torch.autocast(**ctx.autocast):
            x: Any = None
            if a_needed or torch.is_grad_enabled():
                x = products.recipe(None, *sources)[0] if products.recipe else sources[0]
            if tensors and torch.is_grad_enabled():  # for gradients of gradients, which go through t
                t = F.linear(x, a)
            given: Any = t if tensors else of_t
            shape = (*given.shape[:-1], a.shape[1])
            t = _rows(given)
            of_t = torch.zeros_like(t) if of_t is None else _rows(of_t).clone() if tensors else t
            starts = itertools.accumulate(products.ranks, initial=0)
            reached = []
            for index, ((site, part, alpha), start) in enumerate(zip(products.each(t, tensors), starts, strict=False)):
                if (of_y := of_ys[index]) is None:
                    continue
                of_y = _rows(of_y)
                _, _, b_place, scale_place = range(place := products.sources + _EACH * index, place + _EACH)
                if site.scale is not None:
                    scale = site.scale
                    if rest_needed[scale_place]:
                        scale = _invertible(scale)
                        of_rest[scale_place] = (of_y * _rows(ys[index])).sum(0) / scale
                    of_y = of_y * scale
                reached.append((of_y, site.weight))
                _add_product(of_t.narrow(1, start, part.shape[1]), of_y, site.b, alpha)
                if rest_needed[b_place]:
                    # The narrow matrix first: the other way round it takes up to twice the time.
                    of_rest[b_place] = alpha * (part.t() @ of_y).t()
            of_a = of_t.t() @ _rows(x) if a_needed else None
            of_x = None
            if x_needed:
                of_x = of_t @ a
                for of_y, weight in reached:
                    _add_product(of_x, of_y, weight)
                of_x = of_x.view(shape)
        return None, of_x, of_a, *of_rest


def _scale_places(tensors: Sequence[Any]) -> range:
    return range(_EACH - 1, len(tensors), _EACH)


def _invertible(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, _SMALLEST_SCALE, scale)


def _rows(tensor: Tensor) -> Tensor:
    """As a matrix; a view of the results of products, which are contiguous."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _add_product(into: Tensor, one: Tensor, other: Tensor, alpha: float = 1.0) -> Tensor:
    """`into += alpha one other`."""
    if into.dtype in HALF and into.device.type == "cpu":
        # There the sum would be rounded more than once.
        return into.add_(one @ other, alpha=alpha)
    return into.addmm_(one, other, alpha=alpha)
