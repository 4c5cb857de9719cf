"""A module with adapters around it, as `wrap` puts it into a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..adapters.bank import check_rows, check_slots, ids_of
from ..adapters.beneath import is_beneath, require_tensors, rows_of_replaced
from ..adapters.dependencies import Dependencies
from ..adapters.frozen_site import FrozenSite
from ..adapters.param_spec import AdapterTensors
from ..adapters.placement import Placement
from ..adapters.switches import Switches
from ..compat.torch_modules import MODULES
from ..errors import AdapterError, ConfigError
from ..sites.computed import Computation
from ..sites.site import Site
from ..storage.dequantized import DequantizedLinear


class AdaptedLinear(nn.Module):
    """A frozen linear, embedding or convolution module with adapters around it.

    Args:
        base: the module, which is called unchanged.
        site: the site that the module is.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = replace(site, calls=())  # nodes of a graph, which a copy of this module would copy
        self.placements: list[Placement] = []
        self.batch: int | str = 0  # the dimension that counts the rows of the batch, or why it is not known
        self.dependencies: dict[int, Dependencies] = {}  # by the index of an adapter
        self.computed_weight = _inside(site, site.computed_weight)
        self.computed_bias = _inside(site, site.computed_bias)
        # A quantized linear casts its input to the type in which it multiplies, and the site is between the casts.
        self.inner_dtype: torch.dtype | None = None
        if isinstance(base, DequantizedLinear) and "val" in site.calls[0].x.meta:
            self.inner_dtype = base.compute_dtype
        self.training = base.training
        # Without a hook, nn.TransformerEncoderLayer may take its fast path, which reads the weights of its linears.
        self.register_forward_hook(_keep)

    def add(self, placement: Placement, model: nn.Module, dependencies: Dependencies) -> None:
        """Put an adapter around the present ones.

        Args:
            placement: the adapter. Its tensors are registered in `model`.
            model: contains this.
            dependencies: what its `forward` reads.

        Raises:
            ConfigError: it reads a weight, and the adapters below it leave none.
        """
        self.dependencies[placement.adapter] = dependencies
        for inner in self._beneath(placement, self.placements):
            require_tensors(inner.local, self.site, type(placement.variant).__name__)
        self.placements.append(placement)
        # Not a submodule: a tensor that all sites share is the model's alone, and read there when it is used.
        vars(self)["adapted_model"] = model

    def _dim_of_rows(self) -> int:
        """Return the dimension of the input and the output that counts the rows of the batch.

        Raises:
            AdapterError: the graph of the model does not tell which row is which there.
        """
        if isinstance(self.batch, str):
            raise AdapterError(self.batch)
        return self.batch

    def frozen_weight(self) -> Tensor:
        """Return the frozen weight as the site stores it: the module's, or computed from the module's tensors.

        With its gradient, for a parameter of the base that trains.
        """
        return self.weight if self.computed_weight is None else self.computed_weight.value(self.base)

    def frozen_bias(self) -> Tensor | None:
        """Return the frozen bias as the site stores it, or None."""
        return self.bias if self.computed_bias is None else self.computed_bias.value(self.base)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as the module stores it. Some models read it from outside."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias `(d_out,)`, or None."""
        return getattr(self.base, "bias", None)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped module, because models read some (`in_features`) from outside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = vars(self).get(MODULES, {})  # without the base while the wrapper is made, copied or read
            if "base" not in modules or name.startswith("__"):
                raise
            return getattr(modules["base"], name)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Compute the adapted module. Its one argument may have any name, as for the module that it wraps."""
        (x,) = (*args, *kwargs.values())
        switches: Switches = vars(self)["adapted_model"].switches
        frozen = FrozenSite(self.site, self.frozen_weight(), self.frozen_bias(), self.training)
        call: Callable[..., Tensor] = self._call
        acting = [placement for placement in self.placements if switches.acts(placement.adapter_name)]
        for index, placement in enumerate(acting):
            read = frozen
            for inner in self._beneath(placement, acting[:index]):
                own = inner.adapter_name == placement.adapter_name
                scale = None if own else switches.scales.get(inner.adapter_name)
                if scale is not None and scale.dim():
                    raise rows_of_replaced(self.site.name, inner.adapter_name, placement.adapter_name)
                read = read.with_adapter(inner.local, self._tensors(inner), scale)
            call = self._adapted(call, read, placement, switches)
        if self.inner_dtype in (None, x.dtype):
            return call(x)
        return call(x.to(self.inner_dtype)).to(x.dtype)

    def _beneath(self, placement: Placement, inner: list[Placement]) -> list[Placement]:
        """Return those of the adapters `inner` that make the weight and the bias that `placement` reads."""
        if not self.dependencies[placement.adapter].tensors:
            return []
        name = placement.adapter_name
        return [each for each in inner if is_beneath(each.adapter_name, self.dependencies[each.adapter].replaces, name)]

    def _adapted(
        self, call: Callable[..., Tensor], frozen: FrozenSite, placement: Placement, switches: Switches
    ) -> Callable[..., Tensor]:
        """Return the function `call` of the input with an adapter around it."""
        p, scale = self._tensors(placement), switches.scales.get(placement.adapter_name)
        rows = self._dim_of_rows() if placement.local.slots or (scale is not None and scale.dim()) else 0
        if placement.local.slots is None:
            return lambda x, **given: frozen.adapted(call, placement.local, p, x, scale=scale, rows=rows, **given)
        banked = replace(frozen, site=frozen.site.with_bank(placement.local.slots, rows))
        ids = ids_of(switches.ids)
        check_slots(ids, placement.local.slots)

        def adapted(x: Tensor, **given: Tensor) -> Tensor:
            check_rows(ids, x.shape[rows])
            return banked.adapted(call, placement.local, p, x, ids, scale=scale, rows=rows, **given)

        return adapted

    def _call(self, x: Tensor, **given: Tensor) -> Tensor:
        """Call the wrapped module, with a weight or bias in place of its own if they are given."""
        if given and isinstance(self.base, DequantizedLinear):  # which has no dense parameter to replace
            return self.base.product(x, **given)
        computed = {"weight": self.computed_weight, "bias": self.computed_bias}
        if any(computed[name] is not None for name in given):  # the module would compute its own
            weight, bias = given.get("weight"), given.get("bias")
            weight = self.frozen_weight() if weight is None else weight
            return self._product(x, weight, self.frozen_bias() if bias is None else bias)
        output: Tensor = functional_call(self.base, given, (x,)) if given else self.base(x)
        return output

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the wrapped module would compute with this weight and bias, given as it stores them."""
        kind = self.site.kind
        entered = kind.enter(x, weight.dtype, self.site.name)
        y = kind.result(kind.multiply(x, kind.factor(weight)), entered)
        bias = self.site.own_bias(bias)
        return kind.leave(y if bias is None else y + bias.type_as(y))

    def _tensors(self, placement: Placement) -> Any:
        # The qualified names end in the names of attributes here, wherever in the model this module is. Those without
        # a dot are of tensors that all sites share.
        return AdapterTensors(
            {
                name: getattr(self if "." in path else self.adapted_model, path.rpartition(".")[2])
                for name, path in placement.tensors.items()
            }
        )


def _inside(site: Site, computed: fx.Node | None) -> Computation | None:
    """Return how the module of `site` computes a weight or bias; None if that is a parameter of it.

    Raises:
        ConfigError: it is computed from tensors outside the module.
    """
    if computed is None:
        return None
    inside = Computation.of(computed).inside(site.name)
    if inside is None:
        raise ConfigError(
            f"Site {site.name!r} has a weight or bias that is computed from tensors outside its module"
            f" ({', '.join(Computation.of(computed).tensors)}), so it cannot be wrapped eagerly; rewrite can adapt it."
        )
    return inside


def _keep(*_: Any) -> None:
    """Change nothing: a hook."""
