"""The adapters of an adapted model: where they are, and their tensors.

A graph module says it in the provenance of its nodes, an eagerly wrapped model in its wrapped modules; both keep
each tensor under the qualified name `<site>.<name>`, so everything here works on either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx, nn

from ..graph.provenance import (
    SHARED,
    Insertion,
    insertions,
    qualified_names,
)
from ..graph.tensors import tensor_of
from ..sites.site import Site
from .registry import from_config
from .variant import Statistic, Variant, adapter_namespace


@dataclass(frozen=True)
class Placement:
    """One adapter at one site.

    Args:
        variant: the adapter's config.
        adapter: its index in the order in which adapters were added to the model.
        site: qualified name of the site.
        position: its index among the adapters of the site, the innermost first.
        names: names of its tensors, as the variant calls them.
    """

    variant: Variant
    adapter: int
    site: str
    position: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, variant: Variant, adapter: int, site: Site, position: int) -> Placement:
        """Return the placement of `variant` at `site`, with the tensors that the variant asks for there."""
        return cls(variant, adapter, site.name, position, tuple(variant.for_site(site.name).tensor_specs(site)))

    @property
    def tensors(self) -> dict[str, str]:
        """The qualified name of each tensor."""
        return qualified_names(self.site, self.adapter, self.position, self.names)

    @cached_property
    def local(self) -> Variant:
        """The variant as it is at this site: with the rank and alpha that its patterns give it."""
        return self.variant.for_site(self.site)

    def register(self, model: nn.Module, site: Site, weight: Tensor) -> None:
        """Add the tensors to `model`: parameters where trainable, else buffers.

        They are not filled yet. The exception are tensors that all sites of the adapter share: the first site adds
        and fills them.

        Args:
            model: gets the tensors; it has a module of the site's name already.
            site: the site of this placement.
            weight: the frozen weight of the site. The tensors follow its dtype and device.
        """
        specs = self.local.tensor_specs(site)
        for name, qualified in self.tensors.items():
            path, _, attribute = qualified.rpartition(".")
            module = model.get_submodule(path)
            shared = name.startswith(SHARED)
            if shared and hasattr(module, attribute):
                continue
            tensor = specs[name].empty(self.variant.param_dtype(weight.dtype), weight.device)
            if shared:
                specs[name].fill(tensor)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(attribute, tensor)
            else:
                module.register_buffer(attribute, tensor)

    def initialize(self, model: nn.Module, site: Site, weight: Tensor, statistic: Statistic | None = None) -> None:
        """Write the start values into the tensors.

        Args:
            model: has the tensors, see `register`.
            site: the site of this placement.
            weight: the frozen weight of the site, as `site_weight` returns it.
            statistic: the variant's observation of the site on calibration data, or None without such data.
        """
        self.local.initialize(site, weight, self.namespace(model), statistic)

    def namespace(self, model: nn.Module) -> Any:
        """The tensors as attributes by the variant's own names, for `Variant.forward`."""
        return adapter_namespace({name: tensor_of(model, path) for name, path in self.tensors.items()})


def site_weight(model: nn.Module, site: Site) -> Tensor:
    """The frozen weight of `site` in a captured graph, as `(d_out, d_in)`; of experts, `(experts, d_out, d_in)`."""
    return site.kind.matrix(tensor_of(model, site.weight).detach())


def site_bias(model: nn.Module, site: Site) -> Tensor | None:
    """The frozen bias `(d_out,)` of `site` in a captured graph, or None."""
    return site.own_bias(tensor_of(model, site.bias).detach() if site.bias else None)


@runtime_checkable
class HasGraphs(Protocol):
    """A module that runs graphs and is none: what `adapt` returns."""

    def adapted_graph(self) -> fx.GraphModule:
        """The graph with all sites, over the module's tensors."""
        ...

    def without_adapters(self, fold: bool) -> nn.Module:
        """The module as it was before, with the adapters folded into copies of the adapted weights, or left out."""
        ...


def graph_of(model: nn.Module) -> nn.Module:
    """The graph of an adapted model that has one; else the model."""
    return model.adapted_graph() if isinstance(model, HasGraphs) else model


def placements(model: nn.Module) -> list[Placement]:
    """All adapters of an adapted model, in the order in which they were inserted; none for a model without."""
    found: dict[tuple[int, str], Placement] = {}
    if isinstance(model, fx.GraphModule):
        for insertion in insertions(model.graph):
            key = (insertion.adapter, insertion.site)
            if key not in found:
                variant = from_config(insertion.config)
                found[key] = Placement(variant, insertion.adapter, insertion.site, insertion.position, insertion.names)
    else:
        for module in model.modules():
            for placement in getattr(module, "placements", ()):
                found[placement.adapter, placement.site] = placement
    return sorted(found.values(), key=lambda placement: placement.adapter)


def adapters(model: nn.Module) -> Iterator[tuple[Variant, list[Placement]]]:
    """Each adapter of an adapted model: its config and its placements."""
    by_adapter: dict[int, list[Placement]] = {}
    for placement in placements(model):
        by_adapter.setdefault(placement.adapter, []).append(placement)
    for members in by_adapter.values():
        yield members[0].variant, members


def adapter_tensor_names(model: nn.Module) -> list[str]:
    """Qualified names of the tensors of all adapters, frozen ones included."""
    # A graph says so itself, also where the variant's class is not known to this process.
    found: Iterable[Insertion | Placement] = (
        insertions(model.graph) if isinstance(model, fx.GraphModule) else placements(model)
    )
    return list(dict.fromkeys(name for adapter in found for name in adapter.tensors.values()))
