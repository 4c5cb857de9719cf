"""Insert an adapter into a graph."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..adapters import Placement, site_weight
from ..capture import fake_input, fake_like, trace
from ..errors import ConfigError
from ..provenance import INLET, OUTLET, Insertion, Provenance, insertions, outermost, record
from ..site import Call, Site, find_sites, span
from ..variant import FrozenLinear, Variant, adapter_namespace, to_config
from .graph_pass import GraphPass
from .mode import follow_mode

aten = torch.ops.aten


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
    """

    variant: Variant
    adapter: int
    names: tuple[str, ...]

    def run(self, gm: fx.GraphModule) -> int:
        around: dict[str, list[Insertion]] = defaultdict(list)
        next_call = 0
        for insertion in insertions(gm.graph):
            around[insertion.site].append(insertion)
            next_call = insertion.call + 1
        first_call = next_call
        fragments: dict[object, Fragment] = {}
        for site in find_sites(gm):
            there = {insertion.adapter for insertion in around[site.name]}
            if site.name not in self.names or self.adapter in there:
                continue
            names = tuple(self.variant.params(site))
            placement = Placement(self.variant, self.adapter, site.name, len(there), names)
            self._register(gm, site, placement)
            for call in site.calls:
                x, y = outermost(around[site.name], call.x, call.y)
                value = fake_input(x, site_weight(gm, site))
                key = (str(value.shape), value.dtype, site.d_out, site.roles, site.bias is None)
                if key not in fragments:
                    fragments[key] = trace_fragment(gm, site, placement, value)
                _splice(gm, site, Call(x, y, call.node), placement, fragments[key], next_call, self.name)
                next_call += 1
        return next_call - first_call

    @staticmethod
    def _register(gm: fx.GraphModule, site: Site, placement: Placement) -> None:
        if site.name not in dict(gm.named_modules()):
            gm.add_submodule(site.name, nn.Module())
        weight = site_weight(gm, site)
        placement.register(gm, site, weight.dtype, weight.device)


@dataclass(frozen=True)
class Fragment:
    """A variant's `forward` at a site, traced.

    Args:
        graph: placeholders `x`, `weight`, `bias` and the variant's tensors (of those, the ones that exist).
        base: the node that stands for the call of the frozen linear.
        inputs: what each placeholder stands for, in order.
    """

    graph: fx.Graph
    base: fx.Node
    inputs: dict[fx.Node, str]


def trace_fragment(gm: fx.GraphModule, site: Site, placement: Placement, x: Tensor) -> Fragment:
    """Trace the variant's `forward` on stand-ins for the site's tensors and an input `x (..., d_in)`.

    Raises:
        ConfigError: `forward` does not call `base` exactly once.
    """
    weight = site_weight(gm, site)
    tensors = {"x": x, "weight": fake_like(weight, x)}
    if site.bias is not None:
        tensors["bias"] = fake_like(gm.get_parameter(site.bias), x)
    namespace = placement.namespace(gm)
    tensors |= {name: fake_like(getattr(namespace, name), x) for name in placement.names}
    # `base(x)` is recorded as a product with a weight of its own, so that it can be told from uses of base.weight.
    tensors["product"] = fake_like(weight.detach().to(x.dtype), x)

    def run(values: tuple[Tensor, ...], training: bool) -> Tensor:
        named = dict(zip(tensors, values, strict=True))
        base = FrozenLinear(
            lambda v: F.linear(v, named["product"]), named["weight"], named.get("bias"), site, training
        )
        p = adapter_namespace({name: named[name] for name in placement.names})
        return placement.variant.forward(named["x"], base, p)

    values = tuple(tensors.values())
    graph = trace(lambda *values: run(values, True), values)
    follow_mode(graph, trace(lambda *values: run(values, False), values))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, tensors, strict=True))
    product = placeholders[-1]
    calls = list(product.users)
    if len(calls) != 1:
        raise ConfigError(
            f"{type(placement.variant).__name__}.forward must call base(...) exactly once; it called it {len(calls)} times."
        )
    return Fragment(graph, calls[0], inputs)


def _splice(
    gm: fx.GraphModule, site: Site, call: Call, placement: Placement, fragment: Fragment, number: int, by: str
) -> None:
    """Copy `fragment` into the graph around `call`."""
    graph = gm.graph
    provenance = Provenance(site.name, placement.adapter, placement.position, number, placement.names, by=by)
    config = json.dumps(to_config(placement.variant))
    inside = span(call.x, call.y)
    copies: dict[fx.Node, fx.Node] = {fragment.base: call.y}
    inserted: list[fx.Node] = []

    def add(node: fx.Node) -> fx.Node:
        if "nn_module_stack" in call.node.meta:
            node.meta["nn_module_stack"] = call.node.meta["nn_module_stack"]
        record(node, provenance)
        inserted.append(node)
        return node

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = source(fragment.inputs[node]) if node.op == "placeholder" else add(graph.node_copy(node, copy))
        return copies[node]

    def source(name: str) -> fx.Node:
        if name == "x":
            return call.x
        if name == "bias":
            return add(graph.get_attr(site.bias or ""))
        if name == "weight":
            weight = add(graph.get_attr(site.weight))
            return add(graph.call_function(aten.t.default, (weight,))) if site.transposed else weight
        return add(graph.get_attr(placement.tensors[name]))

    body = [node for node in fragment.graph.nodes if node.op not in ("placeholder", "output")]
    split = body.index(fragment.base)
    base_input = fragment.base.args[0]
    changes_input = fragment.inputs.get(base_input) != "x"
    parts = {}
    if changes_input:
        with graph.inserting_before(inside[0]):
            for node in body[:split]:
                copy(node)
        inlet = parts[INLET] = copies[base_input]
        for node in inside:
            node.replace_input_with(call.x, inlet)
        body = body[split + 1 :]
    with graph.inserting_before(call.y.next):
        for node in body:
            if node is not fragment.base:
                copy(node)
    (result,) = fragment.graph.output_node().args
    if result is not fragment.base:
        outlet = parts[OUTLET] = copies[result]
        own = set(inserted)
        call.y.replace_all_uses_with(outlet, delete_user_cb=lambda user: user not in own)
    if not parts:
        raise ConfigError(f"{type(placement.variant).__name__}.forward returns base(x) unchanged.")
    for part, node in parts.items():
        record(node, replace(provenance, part=part, config=config))
