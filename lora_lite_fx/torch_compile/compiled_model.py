"""Compile the graphs of a model that was given to `torch.compile` as it is, with a config for the backend.

Its graphs say nothing about adapters. But the model's parameters are inputs of its graphs, and by these the sites are
known. `CompiledModel` decides on the sites and compiles a graph; `SharedGraph` runs it, for one layer or for others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.contract import rehearse
from ..adapters.placement import Placement, placements
from ..adapters.switches import Switches
from ..adapters.variant import Variant
from ..capture.record_run import record_run
from ..errors import AdapterError
from ..execution.reading import Reader, reader_of
from ..graph.provenance import inner_name
from ..graph.sharded import refuse_sharded
from ..graph.tensors import has_attribute, tensor_names, tensor_of
from ..rewriting.plan import make_plans
from ..sites.finding import find_sites
from ..sites.roles import ROLES
from ..sites.site import Site
from .dynamo_graph import Compiled, Compiler, name_modules, to_aten, to_inputs
from .insert_marked import MarkedSite, compile_for_both_modes, insert_marked
from .marked_model import mark_sites, not_a_linear
from .site_watch import SiteWatch


@dataclass(frozen=True)
class KnownSite:
    """A site of the model.

    Args:
        site: as it is in the whole model.
        weight: its frozen weight.
        placements: its adapters, the innermost first; none if it is not adapted.
    """

    site: Site
    weight: Tensor
    placements: tuple[Placement, ...] = ()

    def computes_like(self, other: KnownSite, model: nn.Module) -> bool:
        """Return whether one graph serves this site and `other`, because their adapters compute the same.

        Args:
            other: the site that the graph was captured for.
            model: has the tensors of that site.
        """
        if len(self.placements) != len(other.placements):
            return False
        return all(
            (own.adapter, own.local, _sizes(own, self.site)) == (its.adapter, its.local, _sizes(its, other.site))
            and rehearse(its.local, other.site, model).hold_at(self.site)
            for own, its in zip(self.placements, other.placements, strict=True)
        )


def _sizes(placement: Placement, site: Site) -> list[Any]:
    """Return the name, shape and dtype of each tensor of an adapter."""
    return [(name, spec.shape, spec.dtype) for name, spec in placement.local.tensor_specs(site).items()]


class CompiledModel:
    """A model that is compiled as it is: its sites, and its copy that carries their adapters.

    Args:
        model: it is not changed.
        adapters: to be inserted, see `as_adapters`.
        args, kwargs: inputs of its first call, on which the model runs once to decide on the sites.

    Raises:
        SelectionError: a variant's targets match no site.
        ConfigError: a variant does not fit a site; or a site is not a module that is called.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[tuple[str, Variant]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        way_out = (
            "rewrite or adapt the whole model, and divide the result by llfx.parallelize(model) or llfx.shard(model)"
        )
        refuse_sharded(model, "backend cannot adapt a model", way_out)
        # A compiled call may run in inference mode, in which parameters that can be trained cannot be made.
        with torch.inference_mode(False), torch.enable_grad():
            run = record_run(model, args, kwargs)
            self.marked = mark_sites(model, make_plans(run, adapters, None))
        self.model = model
        self.adapters = adapters
        self.names = tensor_names(model)
        around: dict[str, list[Placement]] = defaultdict(list)
        for placement in placements(self.marked):
            around[placement.site].append(placement)
        self.sites = {
            site.name: KnownSite(site, _weight_of(model, site), tuple(around[site.name])) for site in find_sites(run)
        }
        self.watch = SiteWatch(model, self.marked, [name for name, known in self.sites.items() if known.placements])

    def compile(self, gm: fx.GraphModule, inputs: list[Any], inner: Compiler) -> Compiled:
        """Compile a graph of the model, with the adapters of the sites that are in it.

        Args:
            gm: Dynamo's graph; it is not changed.
            inputs: Dynamo's example inputs.
            inner: compiles the rewritten graph; a graph that reads no tensor of the model as it is.

        Raises:
            AdapterError: a site would run without its adapters.
        """
        self._refresh()
        frozen = {i for i, tensor in enumerate(inputs) if id(tensor) in self.names}
        if not frozen:
            return inner(gm, inputs)
        aten = to_aten(gm, inputs, self.names)
        name_modules(aten, self.model)
        sites = self._sites_in(aten)
        insert_marked(aten, [self._marked(known) for known in sites if known.placements])
        added, stand_ins = to_inputs(aten, inputs)
        # Detached stand-ins, because real tensors that Dynamo has not seen would get dynamic shapes of their own.
        values = [node.meta["val"] for node in aten.graph.find_nodes(op="placeholder")]
        examples = [values[i].detach() if i in frozen else tensor for i, tensor in enumerate(inputs)]
        compiled = compile_for_both_modes(aten, examples + stand_ins, inner)
        positions = {id(tensor): i for i, tensor in enumerate(inputs)}
        weights = [positions[id(known.weight)] for known in sites]
        places = {id(tensor): i for i, tensor in enumerate(reader_of(self.marked, _paths(sites))(self.marked))}
        own = [places.get(id(tensor)) for tensor in added]
        constants = [tensor if place is None else None for tensor, place in zip(added, own, strict=True)]
        return SharedGraph(self, compiled, frozen, sites, weights, own, constants).run

    def _sites_in(self, gm: fx.GraphModule) -> list[KnownSite]:
        """Return the sites in a graph, and check that no adapted site runs in it in another form."""
        sites = [self._known(site) for site in find_sites(gm)]
        readers = (user for read in gm.graph.find_nodes(op="get_attr") for user in read.users)
        for name in {inner_name(node) or "" for node in readers}.difference(known.site.name for known in sites):
            if name in self.sites and self.sites[name].placements:
                raise not_a_linear(name)
        return sites

    def _known(self, site: Site) -> KnownSite:
        """Return the site of the model that is `site` in a graph, which may show other roles than the whole model."""
        if site.name not in self.sites:
            with_roles = [replace(site, roles=frozenset({role})) for role in ROLES]
            if any(variant.selects(candidate) for _, variant in self.adapters for candidate in with_roles):
                raise AdapterError(
                    f"Site {site.name!r} did not run in the first call, when the sites were decided on, or on constants"
                    " alone. The way out: leave it out of the targets (exclude_names), or call"
                    " backend.adapt(model, ...) first, with inputs for which all of the model runs."
                )
            self.sites[site.name] = KnownSite(site, tensor_of(self.model, site.weight))
        return self.sites[site.name]

    def _marked(self, known: KnownSite) -> MarkedSite:
        paths = [path for placement in known.placements for path in placement.tensors.values()]
        tensors = {path: tensor_of(self.marked, path) for path in paths}
        return MarkedSite(known.site.name, known.site.roles, known.placements, tensors)

    def _refresh(self) -> None:
        """Look up the weights of all sites again, because the user may have replaced some."""
        self.names = tensor_names(self.model)
        for name, known in self.sites.items():
            self.sites[name] = replace(known, weight=tensor_of(self.model, known.site.weight))

    def site_of(self, weight: Tensor, like: KnownSite) -> KnownSite:
        """Return the site that has this weight, if a graph that was captured for the site `like` computes it.

        Raises:
            AdapterError: there is no such site, so that the graph would run it with the adapters of another.
        """
        self._refresh()
        for known in (self.sites[like.site.name], *self.sites.values()):
            if known.weight is weight and known.computes_like(like, self.model):
                return known
        name = self.names.get(id(weight), "a weight that is not the model's").removesuffix(".weight")
        raise AdapterError(
            f"Site {name!r} runs in the graph that torch.compile captured for {like.site.name!r}, but is adapted"
            " otherwise. The way out: compile the backend's model, which carries its adapters, with"
            ' backend="lora_lite_fx".'
        )


@dataclass(frozen=True, eq=False)
class SharedGraph:
    """A compiled graph, which Dynamo runs for the layer that it captured and for others like it.

    The parameters of another layer come as inputs. Its adapters, which Dynamo does not know of, are found here.

    Args:
        model: the model that it is a graph of.
        compiled: the graph for training (True) and for evaluation (False).
        frozen: the positions among its inputs of the model's parameters and buffers.
        sites: the sites that it was captured for.
        weights: the positions among its inputs of their weights.
        own: for each tensor that it takes after its inputs, its place among the tensors of the adapters, site by site;
            None for a constant.
        constants: the constants at these places.
    """

    model: CompiledModel
    compiled: dict[bool, Compiled]
    frozen: set[int]
    sites: list[KnownSite]
    weights: list[int]
    own: list[int | None]
    constants: list[Tensor | None]
    _by_weights: dict[tuple[int, ...], SitesOfGraph] = field(default_factory=dict)

    def run(self, *inputs: Any) -> Any:
        """Run the graph in the model's mode, with the adapters of the sites whose weights are among the inputs."""
        if vars(self.model.marked)["switches"] != Switches():
            raise AdapterError(
                "active and scaled do not reach a model that was compiled as it is. The way out: compile the backend's"
                ' model, which carries its adapters, with backend="lora_lite_fx"; or leave the scope.'
            )
        weights = [inputs[i] for i in self.weights]
        key = tuple(map(id, weights))
        if key not in self._by_weights:
            self._by_weights[key] = self._sites_with(weights)
        sites = self._by_weights[key]
        tensors = sites.read(self.model.marked)
        added = [
            constant if place is None else tensors[place]
            for place, constant in zip(self.own, self.constants, strict=True)
        ]
        arguments = [tensor.detach() if i in self.frozen else tensor for i, tensor in enumerate(inputs)]
        self.model.watch.ran.update(sites.names)
        return self.compiled[self.model.model.training](*arguments, *added)

    def _sites_with(self, weights: Sequence[Tensor]) -> SitesOfGraph:
        """Return the sites with these weights."""
        sites = [self.model.site_of(weight, known) for weight, known in zip(weights, self.sites, strict=True)]
        read = reader_of(self.model.marked, _paths(sites))
        return SitesOfGraph([known.site.name for known in sites], read, list(weights))


@dataclass(frozen=True, eq=False)
class SitesOfGraph:
    """The sites that a graph runs for, in one layer.

    Args:
        names: of the sites.
        read: reads the tensors of their adapters from the model that carries them.
        weights: their weights, held so that no other tensor can have the identity of one.
    """

    names: list[str]
    read: Reader
    weights: list[Tensor]


def _weight_of(model: nn.Module, site: Site) -> Tensor:
    if not has_attribute(model, site.weight):
        kind = type(model.get_submodule(site.weight.rpartition(".")[0])).__name__
        raise AdapterError(
            f"The backend knows a site by the parameter `weight` of its module, and the {kind} {site.name!r} has none."
            " The way out: rewrite or adapt in place of backend."
        )
    return tensor_of(model, site.weight)


def _paths(sites: Sequence[KnownSite]) -> list[str]:
    """Return the qualified names of the tensors of the adapters at these sites, site by site."""
    adapters = (placement for known in sites for placement in known.placements)
    return [path for placement in adapters for path in placement.tensors.values()]
