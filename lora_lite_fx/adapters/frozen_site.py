"""Compute an adapted site: call the `forward` of a variant on what its kind of site offers as input and weight.

The eager wrapper runs this code, and `passes/adaptation/fragment.py` traces it, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..capture.function_tracing.rehearsal import Refused
from ..graph.insertion import SHARED
from ..sites.site import Site
from .bank import check_coefficients
from .beneath import tensors_with
from .dependencies import Dependencies
from .frozen_linear import FrozenLinear
from .param_spec import AdapterTensors
from .promotion import call_forward, not_innermost
from .variant import Variant


@dataclass(frozen=True)
class FrozenSite:
    """The frozen tensors of a site; or what adapters make of them, for an adapter around these.

    Args:
        site: the site.
        weight: as the model stores it.
        bias: as the model stores it, or None.
        training: whether the model is in training mode, for dropout.
        dependencies: if given, notes what variants read apart from tensors.
    """

    site: Site
    weight: Tensor
    bias: Tensor | None
    training: bool = False
    dependencies: Dependencies | None = None

    def adapted(
        self,
        call: Callable[..., Tensor],
        variant: Variant,
        p: Any,
        x: Tensor,
        *routing: Tensor,
        scale: Tensor | None = None,
        rows: int = 0,
        **given: Tensor,
    ) -> Tensor:
        """Return the output of the site with an adapter around it, in the model's layout.

        Args:
            call: computes the output from an input, both in the model's layout: the frozen one, or one with adapters.
                It takes `weight` and `bias`, as the model stores them, in place of the frozen ones.
            variant: the config of the adapter.
            p: its tensors as attributes.
            x: the input that the model passes, in its layout.
            routing: the other inputs of the product, see `Call.routing`.
            scale: the coefficient of the adapter, `()` or `(batch,)`; None for one that is not scaled.
            rows: the dimension of the output that counts the rows of the batch, if there is a coefficient for each.
            given: a weight or bias in place of the frozen ones, from an adapter around this one.

        Raises:
            ConfigError: a variant does with its input what this kind of site cannot; or an adapter around this one
                replaces the weight or bias.
        """
        if given:
            raise not_innermost("An adapter", self.site.name)
        kind = self.site.kind
        who = f"{type(variant).__name__} cannot adapt {self.site.name!r}"

        def base(entered: Any, **given: Tensor) -> Any:
            return kind.result(call(kind.as_in_model(entered), **self._stored(**given)), entered)

        tensors: dict[str, Tensor] = vars(p)
        operands = AdapterTensors(
            {name: t if name.startswith(SHARED) else kind.operand(t, who) for name, t in tensors.items()}
        )
        weight = kind.frozen_operand(kind.matrix(self.weight), who)
        linear = FrozenLinear(base, weight, self.site.own_bias(self.bias), self.site, self.training)
        if self.dependencies is not None:
            linear = self.dependencies.watch(linear)
        y = kind.leave(call_forward(variant, base, linear, operands, kind.enter(x, self.weight.dtype, who, *routing)))
        return y if scale is None else _between(call(x), y, scale, rows)

    def with_adapter(self, variant: Variant, p: Any, scale: Tensor | None = None) -> FrozenSite:
        """Return the tensors that an adapter makes of these, for the adapters around it.

        Args:
            variant: the config of the adapter.
            p: its tensors as attributes.
            scale: the coefficient `()` that scales what it makes; None for 1.
        """
        site = self.site
        weight, bias = site.kind.matrix(self.weight), site.own_bias(self.bias)
        new, added = tensors_with(variant, p, site, weight, bias, self.dependencies)
        changed = self
        if new is not weight:
            stored = site.kind.stored(_scaled(weight, new, scale), self.weight)
            changed = replace(changed, weight=stored.type_as(self.weight))
        if added is not None and bias is not None and self.bias is not None and added is not bias:
            stored = site.stored_bias(_scaled(bias, added, scale), self.bias)
            changed = replace(changed, bias=stored.type_as(self.bias))
        return changed

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


def _scaled(below: Tensor, made: Tensor, scale: Tensor | None) -> Tensor:
    """Return `below + c (made - below)`, in the type of `made`."""
    if scale is None:
        return made
    return torch.lerp(below.to(made.dtype), made, scale.to(made.dtype))


def _check_shape(name: str, given: Tensor, frozen: Tensor | None) -> None:
    if frozen is None or given.shape != frozen.shape:
        sizes = None if frozen is None else tuple(frozen.shape)
        raise Refused(f"calls base with a {name} {tuple(given.shape)}, and base.{name} is {sizes}")


def _between(y: Tensor, adapted: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Return `y + c (adapted - y)`, where `y` is the output inside an adapter."""
    if scale.dim():
        check_coefficients(scale, adapted.shape[rows])
        scale = scale.view([-1 if dim == rows else 1 for dim in range(adapted.dim())])
    return torch.lerp(y, adapted, scale.to(adapted.dtype))
