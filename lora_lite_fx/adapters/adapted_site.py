"""Compute an adapted site: call the `forward` of its variants on what its kind of site offers as input and weight.

The eager wrapper runs this code, and `passes/adapt/fragment.py` traces it, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..graph.provenance import SHARED
from ..sites.site import Site
from .frozen_linear import FrozenLinear
from .promotion import adapt
from .reads import Reads
from .variant import Variant, adapter_namespace


@dataclass(frozen=True)
class FrozenSite:
    """The frozen tensors of a site.

    Args:
        site: the site.
        weight: as the model stores it.
        bias: as the model stores it, or None.
        training: whether the model is in training mode, for dropout.
        reads: if given, notes what variants read apart from tensors.
    """

    site: Site
    weight: Tensor
    bias: Tensor | None
    training: bool = False
    reads: Reads | None = None

    def adapted(
        self, call: Callable[[Tensor], Tensor], around: Iterable[tuple[Variant, Any]], x: Tensor, *routing: Tensor
    ) -> Tensor:
        """Return the output of the site with its adapters, in the model's layout.

        Args:
            call: computes the frozen output from an input, both in the model's layout.
            around: the variants with their tensors, the innermost first.
            x: the input that the model passes, in its layout.
            routing: the other inputs of the product, see `Call.routing`.

        Raises:
            ConfigError: a variant does with its input what this kind of site cannot.
        """
        around = list(around)
        kind = self.site.kind
        who = f"{' and '.join(type(variant).__name__ for variant, _ in around)} cannot adapt {self.site.name!r}"

        def base(entered: Any) -> Any:
            return kind.result(call(kind.as_in_model(entered)), entered)

        def operands(p: Any) -> Any:
            tensors: dict[str, Tensor] = vars(p)
            return adapter_namespace(
                {name: t if name.startswith(SHARED) else kind.operand(t, who) for name, t in tensors.items()}
            )

        weight = kind.operand(kind.matrix(self.weight), who)
        linear = FrozenLinear(base, weight, self.site.own_bias(self.bias), self.site, self.training)
        if self.reads is not None:
            linear = self.reads.watch(linear)
        adapted = compose(linear, [(variant, operands(p)) for variant, p in around])
        return kind.leave(adapted(kind.enter(x, self.weight.dtype, who, *routing)))


def compose(base: FrozenLinear, around: Iterable[tuple[Variant, Any]]) -> Callable[[Tensor], Tensor]:
    """Return the frozen linear with adapters around it, as a function of `x (..., d_in)`.

    Args:
        base: the frozen linear.
        around: the variants with their tensors, the innermost first. Each adapts the function that the ones before it
            make up. `base.weight` and `base.bias` are the frozen ones for all.
    """
    adapted: Callable[[Tensor], Tensor] = base.call
    for variant, p in around:
        adapted = partial(adapt, variant, adapted, base, p)
    return adapted
