"""Compute an adapted site: call the `forward` of its variants on what its kind of site offers as input and weight.

The eager wrapper runs this code, and `passes/adapt/fragment.py` traces it, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture.rehearsal import Refused
from ..errors import AdapterError
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
        self,
        call: Callable[..., Tensor],
        around: Iterable[tuple[Variant, Any]],
        x: Tensor,
        *routing: Tensor,
        scales: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Return the output of the site with its adapters, in the model's layout.

        Args:
            call: computes the frozen output from an input, both in the model's layout. It takes `weight` and `bias`, as
                the model stores them, in place of the frozen ones.
            around: the variants with their tensors, the innermost first.
            x: the input that the model passes, in its layout.
            routing: the other inputs of the product, see `Call.routing`.
            scales: the coefficients of the variants, `()` or `(batch,)`; empty, or None for one that is not scaled.

        Raises:
            ConfigError: a variant does with its input what this kind of site cannot.
        """
        around = list(around)
        kind = self.site.kind
        who = f"{' and '.join(type(variant).__name__ for variant, _ in around)} cannot adapt {self.site.name!r}"

        def base(entered: Any, **given: Tensor) -> Any:
            return kind.result(call(kind.as_in_model(entered), **self._stored(**given)), entered)

        def operands(p: Any) -> Any:
            tensors: dict[str, Tensor] = vars(p)
            return adapter_namespace(
                {name: t if name.startswith(SHARED) else kind.operand(t, who) for name, t in tensors.items()}
            )

        weight = kind.operand(kind.matrix(self.weight), who)
        linear = FrozenLinear(base, weight, self.site.own_bias(self.bias), self.site, self.training)
        if self.reads is not None:
            linear = self.reads.watch(linear)
        adapted = compose(linear, [(variant, operands(p)) for variant, p in around], scales)
        return kind.leave(adapted(kind.enter(x, self.weight.dtype, who, *routing)))

    def _stored(self, weight: Tensor | None = None, bias: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors that replace the frozen ones, as the model would store them.

        Raises:
            Refused: one has not the shape of the frozen tensor, or the site has no such tensor.
        """
        stored: dict[str, Tensor] = {}
        if weight is not None:
            if not self.weight.is_floating_point():
                raise Refused(f"calls base with a weight, and the site's is quantized ({self.weight.dtype})")
            _check_shape("weight", weight, self.site.kind.matrix(self.weight))
            stored["weight"] = self.site.kind.stored(weight, self.weight).type_as(self.weight)
        if bias is not None:
            if self.bias is None:
                raise Refused("calls base with a bias, and the site has none")
            _check_shape("bias", bias, self.site.own_bias(self.bias))
            stored["bias"] = self.site.stored_bias(bias, self.bias).type_as(self.bias)
        return stored


def _check_shape(name: str, given: Tensor, frozen: Tensor | None) -> None:
    if frozen is None or given.shape != frozen.shape:
        sizes = None if frozen is None else tuple(frozen.shape)
        raise Refused(f"calls base with a {name} {tuple(given.shape)}, and base.{name} is {sizes}")


def compose(
    base: FrozenLinear, around: Sequence[tuple[Variant, Any]], scales: Sequence[Tensor | None] = ()
) -> Callable[[Tensor], Tensor]:
    """Return the frozen linear with adapters around it, as a function of `x (..., d_in)`.

    Args:
        base: the frozen linear.
        around: the variants with their tensors, the innermost first. Each adapts the function that the ones before it
            make up. `base.weight` and `base.bias` are the frozen ones for all.
        scales: the coefficient of each, or None; empty if none is scaled.
    """
    adapted: Callable[..., Tensor] = base.call
    for (variant, p), scale in zip(around, scales or [None] * len(around), strict=True):
        inside, adapted = adapted, partial(adapt, variant, adapted, base, p)
        if scale is not None:
            adapted = partial(_between, inside, adapted, scale)
    return adapted


def _between(
    inside: Callable[..., Tensor], adapted: Callable[..., Tensor], scale: Tensor, x: Any, **given: Tensor
) -> Tensor:
    """Return `y + c (adapted - y)`, where `y` is the output inside an adapter."""
    y, full = inside(x), adapted(x, **given)
    if scale.dim():
        if len(scale) != full.shape[0]:
            raise AdapterError(
                f"There are {len(scale)} coefficients, one for each row of the batch, and {full.shape[0]} rows of an"
                " output."
            )
        scale = scale.view(-1, *[1] * (full.dim() - 1))
    return torch.lerp(y, full, scale.to(full.dtype))
