"""Insert an adapter into a graph."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from ...adapters.adapted_site import FrozenSite
from ...adapters.placement import Placement, site_weight
from ...adapters.registry import to_config
from ...adapters.variant import Variant, adapter_namespace
from ...capture.tracing import fake_input, fake_like, trace
from ...errors import ConfigError
from ...graph.provenance import (
    INLET,
    OUTLET,
    Insertion,
    Provenance,
    insertions,
    outermost,
    record,
)
from ...graph.tensors import register_tensor, tensor_of
from ...sites.finding import find_sites
from ...sites.site import Call, Site, span
from ..normalize.follow_mode import follow_mode
from ..pipeline import GraphPass


@dataclass(frozen=True)
class InsertAdapter(GraphPass):
    """Insert `variant` at the sites called `names`, around the adapters that are there.

    The subgraph is the variant's own `forward`, traced, so it computes what the eager wrapper does. The nodes of
    the frozen linear stay; what changes is who reads their output and, for variants that change the input, which
    node they read. Every inserted node says so in its provenance, which is all that `RemoveAdapters` needs.

    Args:
        variant: what to insert.
        adapter: its index in the order of the model's adapters.
        names: qualified names of sites.
        roles: what is known of the roles of sites; for a graph that is a piece of the model and does not show them.
        tensors: the tensors of an adapter that exists, by qualified name; without, new ones are made.
    """

    variant: Variant
    adapter: int
    names: tuple[str, ...]
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, gm: fx.GraphModule) -> int:
        around: dict[str, list[Insertion]] = defaultdict(list)
        next_call = 0
        for insertion in insertions(gm.graph):
            around[insertion.site].append(insertion)
            next_call = insertion.call + 1
        first_call = next_call
        fragments: dict[object, Fragment] = {}
        moved: dict[fx.Node, fx.Node] = {}  # an adapted output may be the input of a call found before
        for found in find_sites(gm):
            site = replace(found, roles=self.roles.get(found.name, found.roles))
            there = {insertion.adapter for insertion in around[site.name]}
            if site.name not in self.names or self.adapter in there:
                continue
            names = tuple(self.variant.for_site(site.name).tensor_specs(site))
            placement = Placement(self.variant, self.adapter, site.name, len(there), names)
            self._register(gm, site, placement)
            for call in site.calls:
                x, y = outermost(around[site.name], moved.get(call.x, call.x), call.y)
                value = fake_input(x, *site.kind.example(tensor_of(gm, site.weight)))
                local = placement.local
                shapes = (str(value.shape), value.dtype, site.kind, site.d_out, site.bias is None, site.bias_rows)
                key = (*shapes, *self.variant.overrides(site.name).items())
                of_site = (*key, local.trace_key(site))
                here = Call(x, y, call.node, call.routing)
                fragment = fragments.get(key) or fragments.get(of_site)
                if fragment is None:
                    fragment = trace_fragment(gm, site, placement, value, call.routing)
                    fragments[of_site if fragment.reads_site else key] = fragment
                moved[y] = _splice(gm, site, here, placement, fragment, next_call, self.name)
                next_call += 1
        return next_call - first_call

    def _register(self, gm: fx.GraphModule, site: Site, placement: Placement) -> None:
        if self.tensors:
            for name in placement.tensors.values():
                register_tensor(gm, name, self.tensors[name])
            return
        if site.name not in dict(gm.named_modules()):
            gm.add_submodule(site.name, nn.Module())
        weight = site_weight(gm, site)
        placement.register(gm, site, weight.dtype, weight.device)


@dataclass(frozen=True)
class Fragment:
    """A variant's `forward` at a site, traced.

    Args:
        graph: placeholders `x`, `weight`, `bias`, the variant's tensors (of those, the ones that exist), and routing.
        inputs: what each placeholder stands for, in order.
        base: the node that stands for the call of the frozen linear.
        base_input: the node that it is called on.
        result: the node that is returned.
        reads_site: whether `forward` looked at its site, so that for another it may be another graph.
    """

    graph: fx.Graph
    inputs: dict[fx.Node, str]
    base: fx.Node
    base_input: fx.Node
    result: fx.Node
    reads_site: bool


def trace_fragment(
    gm: fx.GraphModule, site: Site, placement: Placement, x: Tensor, routing: tuple[fx.Node, ...] = ()
) -> Fragment:
    """Trace the variant's `forward` on stand-ins for the site's tensors, an input `x`, and what routes it.

    Raises:
        ConfigError: `forward` does not call `base` exactly once, or does with `x` what this kind of site cannot.
    """
    stored = tensor_of(gm, site.weight).detach()
    tensors = {"x": x, "weight": fake_like(stored, x)}
    if site.bias is not None:
        tensors["bias"] = fake_like(tensor_of(gm, site.bias), x)
    namespace = placement.namespace(gm)
    tensors |= {name: fake_like(getattr(namespace, name), x) for name in placement.names}
    tensors |= {f"routing {i}": fake_input(node) for i, node in enumerate(routing)}
    # `base(x)` is recorded as a product with a weight of its own, so that it can be told from uses of base.weight.
    dtype = x.dtype if x.dtype.is_floating_point else stored.dtype
    tensors["factor"] = fake_like(site.kind.factor(stored).to(dtype), x)

    read: set[str] = set()

    def run(values: tuple[Tensor, ...], training: bool) -> Tensor:
        named = dict(zip(tensors, values, strict=True))
        routes = [named[name] for name in named if name.startswith("routing ")]
        frozen = FrozenSite(site, named["weight"], named.get("bias"), training, read)
        return frozen.adapted(
            lambda v: site.kind.multiply(v, named["factor"], *routes),
            [(placement.local, adapter_namespace({name: named[name] for name in placement.names}))],
            named["x"],
            *routes,
        )

    values = tuple(tensors.values())
    graph = trace(lambda *values: run(values, True), values)
    if "training" in read:
        follow_mode(graph, trace(lambda *values: run(values, False), values))
    graph.eliminate_dead_code()  # views of the weight that were not needed
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, tensors, strict=True))
    calls = list(placeholders[-1].users)
    if len(calls) != 1:
        raise ConfigError(
            f"{type(placement.variant).__name__}.forward must call base(...) exactly once;"
            f" it called it {len(calls)} times."
        )
    result = graph.output_node().all_input_nodes[0]
    (base_input,) = [n for n in calls[0].all_input_nodes if not inputs.get(n, "").startswith(("factor", "routing "))]
    return Fragment(graph, inputs, calls[0], base_input, result, "site" in read)


def _splice(
    gm: fx.GraphModule, site: Site, call: Call, placement: Placement, fragment: Fragment, number: int, by: str
) -> fx.Node:
    """Copy `fragment` into the graph around `call`; returns the adapted output."""
    graph = gm.graph
    provenance = Provenance(site.name, placement.adapter, placement.position, number, placement.names, by=by)
    copier = _Copier(gm, site, call, placement, fragment, provenance)
    inside = span(call.x, call.y)
    body = [node for node in fragment.graph.nodes if node.op not in ("placeholder", "output")]
    parts: dict[str, fx.Node] = {}
    if fragment.inputs.get(fragment.base_input) != "x":
        split = body.index(fragment.base)
        with graph.inserting_before(inside[0]):
            copier.copy_all(body[:split])
        parts[INLET] = copier.copy(fragment.base_input)
        for node in inside:
            node.replace_input_with(call.x, parts[INLET])
        body = body[split:]
    with graph.inserting_before(call.y.next):
        copier.copy_all(body)
    if fragment.result is not fragment.base:
        parts[OUTLET] = copier.copy(fragment.result)
        own = set(copier.inserted)
        call.y.replace_all_uses_with(parts[OUTLET], delete_user_cb=lambda user: user not in own)
    if not parts:
        raise ConfigError(f"{type(placement.variant).__name__}.forward returns base(x) unchanged.")
    config = json.dumps(to_config(placement.variant))
    for part, node in parts.items():
        record(node, replace(provenance, part=part, config=config))
    return parts.get(OUTLET, call.y)


class _Copier:
    """Copies nodes of a fragment to where the graph inserts, each once, and writes their provenance."""

    def __init__(
        self,
        gm: fx.GraphModule,
        site: Site,
        call: Call,
        placement: Placement,
        fragment: Fragment,
        provenance: Provenance,
    ) -> None:
        self.graph = gm.graph
        self.site = site
        self.call = call
        self.placement = placement
        self.inputs = fragment.inputs
        self.provenance = provenance
        self.copies: dict[fx.Node, fx.Node] = {fragment.base: call.y}
        self.inserted: list[fx.Node] = []

    def copy_all(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            self.copy(node)

    def copy(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            self.copies[node] = (
                self._input(self.inputs[node])
                if node in self.inputs
                else self._inserted(self.graph.node_copy(node, self.copy))
            )
        return self.copies[node]

    def _input(self, name: str) -> fx.Node:
        if name == "x":
            return self.call.x
        if name.startswith("routing "):
            return self.call.routing[int(name.removeprefix("routing "))]
        frozen = {"weight": self.site.weight, "bias": self.site.bias or ""}
        return self._inserted(self.graph.get_attr(frozen.get(name) or self.placement.tensors[name]))

    def _inserted(self, node: fx.Node) -> fx.Node:
        if "nn_module_stack" in self.call.node.meta:
            node.meta["nn_module_stack"] = self.call.node.meta["nn_module_stack"]
        record(node, self.provenance)
        self.inserted.append(node)
        return node
