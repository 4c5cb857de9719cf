"""Run a variant's `forward` at a site on stand-ins for tensors.

`contract.py` runs it on stand-ins of fixed sizes, to check it. `passes/adaptation/fragment.py` traces the same run, on
the stand-ins of a graph, to insert it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..capture.function_tracing.rehearsal import Refused
from ..compat.torch import version_of
from ..errors import shown
from ..sites.site import Site
from .dependencies import Dependencies
from .frozen_site import FrozenSite
from .param_spec import AdapterTensors
from .variant import Variant

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """The operands of an adapted site: stand-ins while it runs, and the placeholders of its fragment.

    Args:
        x: the input that the model passes.
        weight: the frozen weight as the model stores it.
        bias: the frozen bias as the model stores it, or None.
        tensors: the adapter's tensors, by the variant's own names.
        routing: the other inputs of the product, see `Call.routing`.
        factor: the frozen weight once more, in the layout of the operator. Only `base(x)` reads it, so that the call
            of the frozen linear can be told from other uses of the weight.
    """

    x: T
    weight: T
    bias: T | None
    tensors: Mapping[str, T]
    routing: tuple[T, ...]
    factor: T

    def in_order(self) -> list[T]:
        """Return all operands that there are, as one list."""
        return [self.x, *self.frozen(), *self.tensors.values(), *self.routing, self.factor]

    def frozen(self) -> tuple[T, ...]:
        """Return the frozen weight and, if there is one, the frozen bias."""
        return (self.weight, *(() if self.bias is None else (self.bias,)))

    def filled_with(self, values: Iterable[S]) -> Operands[S]:
        """Return the same operands with other values, which come in the order of `in_order`."""
        rest = iter(values)
        return Operands(
            x=next(rest),
            weight=next(rest),
            bias=None if self.bias is None else next(rest),
            tensors={name: next(rest) for name in self.tensors},
            routing=tuple(next(rest) for _ in self.routing),
            factor=next(rest),
        )


def run_forward(
    variant: Variant,
    site: Site,
    operands: Operands[Tensor],
    training: bool,
    dependencies: Dependencies,
    sizes_are_known: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the `forward` of a variant at a site.

    Args:
        variant: the config for the site.
        site: the site.
        operands: the stand-ins. The result is checked for the gradient of `factor`, if that requires one.
        training: the mode.
        dependencies: notes what `forward` reads apart from tensors.
        sizes_are_known: whether sizes may be compared. In a trace that would make them depend on each other.

    Returns:
        The output, and the weight and bias by which `forward` replaces the frozen ones, as the model would store them.

    Raises:
        Refused: `forward` does not call `base` exactly once; or, where sizes are known, returns something else than a
            tensor like `base(x)`.
    """
    replaced: dict[str, Tensor] = {}
    calls: list[_BaseCall] = []

    def base(value: Tensor, **given: Tensor) -> Tensor:
        if given and variant.slots:
            raise Refused("calls base with a weight or bias, and a bank has one frozen weight for all slots")
        if sizes_are_known and value.shape != operands.x.shape:
            raise Refused(f"calls base on an input {tuple(value.shape)}, and x is {tuple(operands.x.shape)}")
        # The nodes of the frozen linear stay in a graph, and read the given tensors: so this product stands for both.
        y = site.kind.multiply(value, operands.factor, *operands.routing)
        replaced.update(given)
        dependencies.replaces |= bool(given)
        calls.append(_BaseCall(value, y, y.shape, y.dtype, version_of(y) if sizes_are_known else 0))
        return y

    frozen = FrozenSite(site, operands.weight, operands.bias, training, dependencies)
    checked = _returning_values(variant, site.kind.value_type)
    y = frozen.adapted(base, checked, AdapterTensors(operands.tensors), operands.x, *operands.routing)
    if len(calls) != 1:
        raise Refused(f"must call base(...) exactly once; it called it {len(calls)} times")
    if sizes_are_known:
        _check_result(y, calls[0])
        unchanged = y is calls[0].y and version_of(y) == calls[0].version and calls[0].x is operands.x
        if training and unchanged and not replaced:
            raise Refused("returns base(x) unchanged")
    return y, replaced


def _returning_values(variant: Variant, kind: type) -> Variant:
    """Return a copy of `variant` whose `forward` refuses a result that is not of this kind, before anything uses it."""
    checked = copy.copy(variant)

    def checking(*args: Any, **kwargs: Any) -> Any:  # by another name than what stack traces are made of
        output = variant.forward(*args, **kwargs)
        if not isinstance(output, kind):
            raise Refused(f"must return a tensor like base(x), and returned {shown(output)}")
        return output

    object.__setattr__(checked, "forward", checking)
    return checked


@dataclass(frozen=True)
class _BaseCall:
    """A call of the frozen linear on `x`, in the model's layout, and what `y` was then: it may be written to later."""

    x: Tensor
    y: Tensor
    shape: torch.Size
    dtype: torch.dtype
    version: int


def _check_result(result: Tensor, base: _BaseCall) -> None:
    """Check the result of `forward`, in the model's layout.

    Raises:
        Refused: it is not a tensor like `base(x)`, or does not depend on it.
    """
    if result.shape != base.shape:
        raise Refused(f"returned a tensor {tuple(result.shape)}, and base(x) is {tuple(base.shape)}")
    if result.dtype != base.dtype:
        raise Refused(
            f"returned {result.dtype}, and base(x) is {base.dtype}. The way out: y = base(x), and at the end"
            " return (...).type_as(y)"
        )
    if not result.requires_grad:
        raise Refused(
            "leaves out the result of base(...), or cuts its gradient by detach() or torch.no_grad(), and the layers"
            " before the site train through it"
        )
