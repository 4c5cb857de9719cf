"""Placements: the adapters of an adapted model, with their places and their tensors.

A graph module has them in the records on its nodes, and an eagerly wrapped model in its wrapped modules. Both keep
each tensor under the qualified name `<site>.<name>`, so the functions here work on either.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx, nn

from ..errors import AdapterError, ConfigError
from ..graph.insertion import DEFAULT, SHARED, Insertion, insertions, qualified_names
from ..graph.tensors import tensor_of
from ..sites.site import Site, stored_bias, stored_weight
from .naming import described
from .param_spec import AdapterTensors
from .registry import recorded_variant
from .start_values import fill, initialize_shared
from .variant import Variant


@dataclass(frozen=True)
class Placement:
    """One adapter at one site.

    Args:
        variant: the adapter's config.
        adapter: its index in the order in which adapters were added to the model.
        site: qualified name of the site.
        position: its index among the adapters of its name at the site, the innermost first.
        names: names of its tensors, as the variant calls them.
        adapter_name: the name that the user gave it.
        scale: a coefficient of it that is a part of the graph.
    """

    variant: Variant
    adapter: int
    site: str
    position: int
    names: tuple[str, ...]
    adapter_name: str = DEFAULT
    scale: float = 1.0

    @classmethod
    def of(
        cls, variant: Variant, adapter: int, site: Site, inner: Iterable[str] = (), adapter_name: str = DEFAULT
    ) -> Placement:
        """Return the placement of `variant` at `site`, with the tensors that the variant asks for there.

        Args:
            variant: the config.
            adapter: its index in the order of the model's adapters.
            site: the site.
            inner: the names of the adapters that are at the site already, each as often as it is there.
            adapter_name: the name of this one.
        """
        names = tuple(variant.for_site(site.name).tensor_specs(site))
        return cls(variant, adapter, site.name, list(inner).count(adapter_name), names, adapter_name)

    @classmethod
    def recorded(cls, insertion: Insertion, known: dict[str, Variant] | None = None) -> Placement:
        """Return the placement that a graph records.

        Args:
            insertion: the record.
            known: the configs of earlier records, by their text; gets this one.

        Raises:
            ConfigError: the class of its variant is not known to this process.
        """
        known = {} if known is None else known
        if (variant := known.get(insertion.config)) is None:
            variant = known[insertion.config] = recorded_variant(insertion.fields)
        place = (insertion.adapter, insertion.site, insertion.position)
        return cls(variant, *place, insertion.names, insertion.adapter_name, insertion.scale)

    @property
    def tensors(self) -> dict[str, str]:
        """The qualified name of each tensor, by the variant's own name."""
        return qualified_names(self.site, self.adapter, self.position, self.names, self.adapter_name)

    @cached_property
    def local(self) -> Variant:
        """The config for this site, with the overrides that the variant's patterns give it."""
        return self.variant.for_site(self.site)

    def register(self, model: nn.Module, site: Site, weight: Tensor) -> None:
        """Add the tensors to `model`: parameters where trainable, else buffers.

        They are not filled yet. The exception are tensors that all sites of the adapter share: the first site adds
        and fills them.

        Args:
            model: gets the tensors; it has a module of the site's name already.
            site: the site of this placement.
            weight: the frozen weight of the site. The tensors follow its dtype and device.

        Raises:
            ConfigError: the module of the site has something of a tensor's name.
        """
        specs = self.local.tensor_specs(site)
        added: dict[str, Tensor] = {}
        for name, qualified in self.tensors.items():
            path, _, attribute = qualified.rpartition(".")
            module = model.get_submodule(path)
            shared = name.startswith(SHARED)
            if shared and hasattr(module, attribute):
                continue
            if hasattr(module, attribute):
                raise ConfigError(
                    f"{described(self.variant, 'params', site)} calls a tensor {name!r}, and the module of the site has"
                    f" {attribute!r} already. Choose another name."
                )
            tensor = specs[name].empty(self.variant.param_dtype(weight.dtype), weight.device)
            if shared:
                added[name] = tensor
                fill(self.local, site, name, specs[name], tensor)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(attribute, tensor)
            else:
                module.register_buffer(attribute, tensor)
        if added:
            initialize_shared(self.local, site, weight, AdapterTensors(added))

    def namespace(self, model: nn.Module) -> Any:
        """Return the tensors as attributes by the variant's own names, for `Variant.forward`."""
        return AdapterTensors({name: tensor_of(model, path) for name, path in self.tensors.items()})


def site_weight(model: nn.Module, site: Site) -> Tensor:
    """Return the frozen weight of `site` as `(d_out, d_in)`; of experts, as `(experts, d_out, d_in)`."""
    return site.kind.matrix(stored_weight(model, site))


def site_bias(model: nn.Module, site: Site) -> Tensor | None:
    """Return the frozen bias `(d_out,)` of `site`, or None."""
    return site.own_bias(stored_bias(model, site))


@runtime_checkable
class HasGraphs(Protocol):
    """A module that runs graphs without being one, such as the result of `adapt`."""

    def adapted_graph(self) -> fx.GraphModule:
        """Return the graph with all sites, over the module's tensors."""
        ...

    def without_adapters(self, fold: bool, requantise: bool = False) -> nn.Module:
        """Return the module without adapters, with these folded into copies of the adapted weights or left out.

        With `requantise`, weights of a quantized base are quantized again after folding.
        """
        ...

    def with_placements(self, placed: Sequence[Placement]) -> nn.Module:
        """Return a copy of the module over the same tensors, with these configs at its places."""
        ...

    def add_to_graphs(self, adapters: Sequence[tuple[str, Variant]], calibration: Any) -> None:
        """Add new adapters to all graphs, with the calibration data of `add`."""

    def insert_from(self, loaded: fx.GraphModule, name: str) -> None:
        """Insert the one adapter of another graph of the model into all graphs, with its tensors, under a name."""

    def delete_from_graphs(self, names: Sequence[str]) -> None:
        """Delete adapters from all graphs."""


def copy_over_tensors(model: nn.Module) -> Any:
    """Return a copy of a model over the same parameters and buffers, the same objects."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def graph_of(model: nn.Module) -> nn.Module:
    """Return the graph of an adapted model that has one, else the model."""
    return model.adapted_graph() if isinstance(model, HasGraphs) else model


def placements(model: nn.Module) -> list[Placement]:
    """Return all placements of a model, in the order of their adapters; none for a model without adapters."""
    by_place: dict[tuple[int, str], Placement] = {}
    known: dict[str, Variant] = {}
    if isinstance(model, fx.GraphModule):
        for insertion in insertions(model.graph):
            place = (insertion.adapter, insertion.site)
            if place not in by_place:
                by_place[place] = Placement.recorded(insertion, known)
    else:
        for module in model.modules():
            for placement in getattr(module, "placements", ()):
                by_place[placement.adapter, placement.site] = placement
    return sorted(by_place.values(), key=lambda placement: placement.adapter)


def next_index(model: nn.Module) -> int:
    """Return the index of the next config that a model gets."""
    return 1 + max((placement.adapter for placement in placements(model)), default=-1)


def by_config(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[Variant, list[Placement]]]:
    """Yield each config of a model with its placements; of the adapter of one name alone if that is given."""
    return configs_of(placements(model), adapter)


def configs_of(placed: Iterable[Placement], adapter: str | None) -> Iterator[tuple[Variant, list[Placement]]]:
    """Yield each config of these placements with those of it, as `by_config`."""
    members_of: dict[int, list[Placement]] = {}
    for placement in placed:
        if adapter in (None, placement.adapter_name):
            members_of.setdefault(placement.adapter, []).append(placement)
    for members in members_of.values():
        yield members[0].variant, members


@dataclass(frozen=True)
class AdapterNames:
    """The names that a model has of adapters. A graph has them in its nodes, where it takes milliseconds to read them.

    Args:
        names: of the adapters, in the order in which they were added.
        tensors: the qualified name of each tensor, with that of its adapter before it. By site, then by name, so that
            the order is one for a graph, a wrapped model and an adapted one, whatever was added first.
        slots: the number of slots of each adapter that is a bank, by its name.
    """

    names: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]
    slots: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> AdapterNames:
        """Return those of a graph, or of a model with wrapped modules, as they are now."""
        first: dict[str, int] = {}
        tensors: dict[tuple[str, str], None] = {}
        slots: dict[str, int] = {}
        # A graph has the names itself, so they are known even if the variant's class is not registered here.
        found: Iterable[Insertion | Placement] = (
            insertions(model.graph) if isinstance(model, fx.GraphModule) else placements(model)
        )
        for each in found:
            name = each.adapter_name
            first[name] = min(each.adapter, first.get(name, each.adapter))
            tensors |= dict.fromkeys((name, path) for path in each.tensors.values())
            count = each.fields.get("slots") if isinstance(each, Insertion) else each.variant.slots
            slots |= {name: count} if count else {}
        by_site = sorted(tensors, key=lambda pair: _order(pair[1]))
        return cls(tuple(sorted(first, key=first.__getitem__)), tuple(by_site), slots)


def _order(path: str) -> list[Any]:
    """Return the key by which qualified names are sorted: layer 2 comes before layer 10."""
    site, _, name = path.rpartition(".")
    return [[(int(digits or 0), text) for digits, text in re.findall(r"(\d+)|(\D+)", part)] for part in (site, name)]


def names_in(model: nn.Module) -> AdapterNames:
    """Return the names that a model has of adapters: those that it has at hand, or read anew."""
    # Only of a graph: what torch.compile returns passes on the attributes of the graph inside, and is not one.
    at_hand = getattr(model, "recorded", None) if isinstance(model, fx.GraphModule) else None
    return at_hand if isinstance(at_hand, AdapterNames) else AdapterNames.of(model)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters of a model, in the order in which they were added."""
    return list(names_in(model).names)


def bank_slots(model: nn.Module) -> Mapping[str, int]:
    """Return the number of slots of each adapter that is a bank, by its name."""
    return names_in(model).slots


def refuse_banks(placed: Iterable[Placement], purpose: str) -> None:
    """Raise AdapterError if a placement is of a bank.

    Args:
        placed: the placements.
        purpose: names in the error what takes one adapter.
    """
    for placement in placed:
        if placement.variant.slots:
            raise AdapterError(
                f"{purpose} takes one adapter, and {placement.adapter_name!r} is a bank of {placement.variant.slots}."
                " The way out: take_slot(model, slot) returns a graph with the adapter of one slot."
            )


def adapter_tensor_names(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Return the qualified names of the tensors of all adapters, including frozen ones; or of that of one name."""
    pairs = names_in(model).tensors
    return list(dict.fromkeys(path for name, path in pairs if adapter in (None, name)))
