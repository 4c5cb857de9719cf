"""The frozen part of a site, and adapters around it: where a variant's function meets the kind of site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..graph.provenance import SHARED
from ..sites.kinds.experts import PerExpert
from ..sites.site import Site
from .frozen_linear import FrozenLinear
from .variant import Variant, adapter_namespace


@dataclass(frozen=True)
class FrozenSite:
    """The frozen tensors of a site.

    Args:
        site: the site.
        weight: as the model stores it.
        bias: as the model stores it, or None.
        training: whether the model is in training mode, for dropout.
        read: if given, gets the names of what variants look at of the `FrozenLinear` they adapt.
    """

    site: Site
    weight: Tensor
    bias: Tensor | None
    training: bool = False
    read: set[str] | None = None

    def adapted(
        self, call: Callable[[Tensor], Tensor], around: Iterable[tuple[Variant, Any]], x: Tensor, *routing: Tensor
    ) -> Tensor:
        """The output of the site with its adapters, in the model's layout, as its input `x` is.

        Args:
            call: computes the frozen output, in the model's layout.
            around: the variants with their tensors, the innermost first.
            x: what the model passes.
            routing: what else the product takes.
        """
        around = list(around)
        kind, experts = self.site.kind, self.site.experts
        who = f"{' and '.join(type(variant).__name__ for variant, _ in around)} cannot adapt {self.site.name!r}"
        entered = kind.enter(x, self.weight.dtype, who, *routing)
        matrix: Any = kind.matrix(self.weight)
        bias = self.site.own_bias(self.bias)

        def base(v: Any) -> Any:
            return kind.result(call(v if isinstance(v, Tensor) else v.value), v)

        def per_expert(p: Any) -> Any:
            named: dict[str, Any] = vars(p)
            return SimpleNamespace(
                **{name: t if name.startswith(SHARED) else PerExpert(t, who) for name, t in named.items()}
            )

        if experts:
            matrix, around = PerExpert(matrix, who), [(variant, per_expert(p)) for variant, p in around]
        linear = FrozenLinear(base, matrix, bias, self.site, self.training)
        if self.read is not None:
            linear = _Watched(**vars(linear), read=self.read)
        return kind.leave(compose(linear, around)(entered))


@dataclass(frozen=True)
class _Watched(FrozenLinear):
    """Notes in `read` what is looked at."""

    read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


def check_kind(variant: Variant, site: Site, stored: Tensor) -> None:
    """Raise `ConfigError` if the config does with the input of `site` what this kind of site cannot.

    Args:
        variant: as it is at the site, finalized.
        site: any site; for a plain linear there is nothing to check.
        stored: its weight as the model stores it.
    """
    if site.kind.name == "linear":
        return
    # Without data: `forward` itself is run on shapes.
    weight = stored.detach().to("meta")
    dtype = variant.param_dtype(weight.dtype)
    tensors = {name: spec.empty(dtype, weight.device).detach() for name, spec in variant.tensor_specs(site).items()}
    x, _ = site.kind.example(weight)
    routing = [torch.empty(site.experts, dtype=torch.int32, device="meta")] if site.kind.routed else []
    factor = site.kind.factor(weight)
    bias = weight.new_empty(site.d_out) if site.bias else None
    FrozenSite(site, weight, bias).adapted(
        lambda v: site.kind.multiply(v, factor, *routing), [(variant, adapter_namespace(tensors))], x, *routing
    )


def compose(base: FrozenLinear, around: Iterable[tuple[Variant, Any]]) -> Callable[[Tensor], Tensor]:
    """The site with its adapters, as a function of `x (..., d_in)`.

    Args:
        base: the frozen linear.
        around: the variants with their tensors, the innermost first. Each adapts what the ones before it compute;
            `base.weight` and `base.bias` are the frozen ones for all.
    """
    adapted: Callable[[Tensor], Tensor] = base.call
    for variant, p in around:
        # Not dataclasses.replace, which looks at every field.
        adapted = partial(variant.forward, base=type(base)(**{**vars(base), "call": adapted}), p=p)
    return adapted
