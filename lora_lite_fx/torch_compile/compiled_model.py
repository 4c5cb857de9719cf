"""The graphs that Dynamo captures of a model, rewritten and compiled.

A model that carries its adapters says in its graphs what is to be inserted. Any other has its parameters in them, by
which its sites are known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.placement import Placement, placements
from ..adapters.variant import Variant
from ..capture.record_run import record_run
from ..errors import AdapterError
from ..graph.provenance import inner_name
from ..graph.tensors import tensor_names, tensor_of
from ..rewriting.plan import make_plans
from ..sites.finding import find_sites
from ..sites.roles import ROLES
from ..sites.site import Site
from .carrier import (
    MarkedSite,
    mark_sites,
    no_linear,
    outside,
)
from .dynamo_call import HooksOnAllModules, RunningCall
from .dynamo_graph import (
    Compiled,
    Compiler,
    to_aten,
    to_inputs,
)
from .insertion import insert_marked, mode_flags, with_mode_flags

# Models that do not: everything is known from the first call.


class CompiledModel:
    """A model compiled as it is: its sites, and the copy that carries their adapters.

    Args:
        model: it is not changed.
        variants: to be inserted.
        args, kwargs: inputs of its first call.
    """

    def __init__(self, model: nn.Module, variants: Sequence[Variant], args: tuple, kwargs: dict[str, Any]) -> None:
        # A compiled call may run in inference mode; parameters that are to be trained cannot be made in it.
        with torch.inference_mode(False), torch.enable_grad():
            ran = record_run(model, args, kwargs)
            self.carrier = mark_sites(model, make_plans(ran, variants, None))
        self.model = model
        self.variants = variants
        self.sites = {site.name: site for site in find_sites(ran)}
        self.placements: dict[str, list[Placement]] = {name: [] for name in self.sites}
        for placement in placements(self.carrier):
            self.placements[placement.site].append(placement)
        self.names = tensor_names(model)
        self.weights = {name: tensor_of(model, site.weight) for name, site in self.sites.items()}
        self.watched = {id(model.get_submodule(name)): name for name, there in self.placements.items() if there}
        # For all modules: hooks on the model's own would be a change of it.
        self.hooks = HooksOnAllModules(partial(enter, self), partial(leave, self))
        self.local = threading.local()
        self.ran: set[str] = set()

    # Never without adapters: the sites' modules are watched while the compiled model runs.

    def watch(self, call: RunningCall) -> None:
        """Notice sites that run in Python in this call, and in later ones of the same compiled function."""
        if not self.watching:
            call.within(self._watch)

    @property
    def watching(self) -> bool:
        return getattr(self.local, "watching", False)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        self.local.watching = True
        try:
            with self.hooks():
                yield
        finally:
            self.local.watching = False

    # One graph.

    def compile(self, gm: fx.GraphModule, inputs: list[Any], inner: Compiler) -> Compiled:
        """A graph of the model, compiled with the adapters of the sites that are in it."""
        frozen = {i for i, tensor in enumerate(inputs) if id(tensor) in self.names}
        if not frozen:
            return inner(gm, inputs)
        aten = to_aten(gm, inputs, self.names)
        self._name_modules(aten)
        there = [self._known(site) for site in find_sites(aten)]
        reading = (user for read in aten.graph.find_nodes(op="get_attr") for user in read.users)
        for name in {inner_name(node) or "" for node in reading}.difference(there):
            if self.placements.get(name):
                raise no_linear(name)
        insert_marked(aten, [self._carried(site) for site in there if self.placements[site]])
        tensors = self._tensors_of(there)
        further, stand_ins = to_inputs(aten, inputs)
        # Detached stand-ins: real tensors that Dynamo has not seen would get dynamic shapes of their own.
        values = [node.meta["val"] for node in aten.graph.find_nodes(op="placeholder")]
        given = [values[i].detach() if i in frozen else tensor for i, tensor in enumerate(inputs)] + stand_ins
        if mode_flags(aten):
            compiled = {training: inner(with_mode_flags(aten, training), given) for training in (True, False)}
        else:
            compiled = dict.fromkeys((True, False), inner(aten, given))

        positions = {id(tensor): i for i, tensor in enumerate(inputs)}
        weights = [positions[id(self.weights[site])] for site in there]
        keys = [next((key for key, tensor in tensors.items() if tensor is one), None) for one in further]
        adapters: dict[tuple[int, ...], tuple[list[str], list[Tensor]]] = {}

        def run(*inputs: Any) -> Any:
            # Dynamo runs the graph of one layer for others like it too, with their parameters as inputs.
            now = tuple(id(inputs[i]) for i in weights)
            if now not in adapters:
                sites = self._in_place_of(there, [inputs[i] for i in weights])
                mine = self._tensors_of(sites)
                adapters[now] = (
                    sites,
                    [one if key is None else mine[key] for key, one in zip(keys, further, strict=True)],
                )
            given = [tensor.detach() if i in frozen else tensor for i, tensor in enumerate(inputs)]
            sites, tensors = adapters[now]
            self.ran.update(sites)
            return compiled[self.model.training](*given, *tensors)

        return run

    def _name_modules(self, gm: fx.GraphModule) -> None:
        """Let the module stacks of `gm` have the modules' qualified names: Dynamo names them by how it came to them."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for node in gm.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            known = {key: names.get(int(str(key).split("@")[0])) for key in stack if str(key).split("@")[0].isdigit()}
            node.meta["nn_module_stack"] = {
                key: (name, stack[key][1]) for key, name in known.items() if name is not None
            }

    def _known(self, site: Site) -> str:
        """The name of a site in a piece of the model, in which it may show other roles than in the whole."""
        if site.name not in self.sites:
            any_role = [replace(site, roles=frozenset({role})) for role in ROLES]
            if not any(variant.selects(one) for variant in self.variants for one in any_role):
                self.sites[site.name], self.placements[site.name] = site, []
                self.weights[site.name] = tensor_of(self.model, site.weight)
                return site.name
            raise AdapterError(
                f"Site {site.name!r} did not run in the first call, when the sites were decided on, or on constants"
                " alone. The way out: leave it out of the targets (exclude_names), or call backend.adapt(model, ...)"
                " first, with inputs for which all of the model runs."
            )
        return site.name

    def _carried(self, site: str) -> MarkedSite:
        there = tuple(self.placements[site])
        paths = [path for placement in there for path in placement.tensors.values()]
        tensors = {path: tensor_of(self.carrier, path) for path in paths}
        return MarkedSite(site, self.sites[site].roles, there, tensors, self.model.training)

    def _tensors_of(self, sites: Sequence[str]) -> dict[tuple[int, int, str], Tensor]:
        """The tensors of the adapters at these sites, by index of the site, adapter, and name."""
        return {
            (i, placement.adapter, name): tensor_of(self.carrier, path)
            for i, site in enumerate(sites)
            for placement in self.placements[site]
            for name, path in placement.tensors.items()
        }

    def _in_place_of(self, sites: Sequence[str], weights: Sequence[Tensor]) -> list[str]:
        """The sites that have these weights, which are to be adapted as `sites` are."""
        found = []
        for site, weight in zip(sites, weights, strict=True):
            if weight is self.weights[site]:
                found.append(site)
                continue
            alike = [other for other, own in self.weights.items() if own is weight and self._alike(site, other)]
            if not alike:
                name = self.names.get(id(weight), "a weight that is not the model's").removesuffix(".weight")
                raise AdapterError(
                    f"Site {name!r} runs in the graph that torch.compile captured for {site!r}, but is adapted"
                    " otherwise. The way out: compile the backend's model, which carries its adapters, with"
                    ' backend="lora_lite_fx".'
                )
            found.append(alike[0])
        return found

    def _alike(self, one: str, other: str) -> bool:
        """Whether the graph of one site, with its adapters, computes the other."""

        def graph_of(name: str) -> list[Any]:
            site = self.sites[name]
            return [(p.adapter, p.local, p.names, p.local.trace_key(site)) for p in self.placements[name]]

        return graph_of(one) == graph_of(other)


def enter(base: CompiledModel, module: nn.Module, args: Any) -> None:
    """Before a module is called from Python."""
    if not torch.compiler.is_compiling() and base.watching and id(module) in base.watched:
        base.ran.discard(base.watched[id(module)])


def leave(base: CompiledModel, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output of a site's module that was called from Python.

    If its forward was in no graph, it ran without its adapters. The carrier's module is then called in its place: if
    Dynamo still captures what is called, it is adapted in a graph of its own; if not, it says so.
    """
    if not torch.compiler.is_compiling() and base.watching and id(module) in base.watched:
        site = base.watched[id(module)]
        if site not in base.ran:
            if not args:  # passed by keyword, which hooks for all modules are not told
                raise outside(site)
            return base.carrier.get_submodule(site)(*args)
    return output
