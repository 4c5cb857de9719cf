"""Insert an adapter into a graph: find, trace, splice, record.

`InsertAdapter` takes four steps at each of its sites:

1. Find the calls of the site, with the adapters that surround them already (`account_for`, `surrounding`).
2. Trace the variant's own `forward` at such a call. The result is a `Fragment`: a graph of its own, see `fragment.py`.
3. Splice a copy of the fragment into the graph. The nodes of the frozen linear stay. Only the readers of their output
   change and, for a variant that changes the input or replaces the weight, the node that they read.
4. Record on every inserted node which adapter it belongs to (`graph/insertion.py`). The record is all that removing,
   merging, saving and inspecting an adapter needs. The nodes have what torch.export gives its own too: `val`, the
   user's line as `stack_trace`, and the modules that they are in, among which the site's has the variant as its type.

The adapter's tensors are registered before step 2. `rewrite` fills them after the pass, `load` from a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from ...adapters.accounting import account_for
from ...adapters.dependencies import Remembered
from ...adapters.placement import Placement, site_weight
from ...adapters.promotion import not_innermost
from ...adapters.registry import to_config
from ...adapters.variant import Variant
from ...errors import ConfigError
from ...graph.insertion import (
    DEFAULT,
    INLET,
    OUTLET,
    PASSED,
    TENSOR,
    Insertion,
    is_inserted,
    leads_only_to,
    record,
    surrounding,
)
from ...graph.modes import flag_name, is_flag
from ...graph.queries import is_deterministic, operation_name
from ...graph.tensors import attribute_of, module_at, register_tensor, tensor_of
from ...graph.walk import ancestors
from ...graph.writes import written_roots
from ...sites.batch.batch_dimension import batch_dim, follow_rows
from ...sites.matching import Call
from ...sites.site import Site, span
from ..pipeline import GraphPass
from .bank_ids import ids_input
from .fragment import Fragment, fragment_at
from .passed_tensors import Below, PassedTensors, beneath


@dataclass(frozen=True)
class InsertAdapter(GraphPass):
    """Insert `variant` at the sites called `names`, around the adapters that are there.

    Safe because the frozen linear keeps its nodes, and because the inserted subgraph is the variant's own `forward`,
    traced: it computes what the eager wrapper computes.

    Args:
        variant: the adapter's config.
        adapter: its index in the order of the model's adapters.
        names: qualified names of sites.
        roles: the roles of sites, by name; for a graph that is a piece of the model and does not show them.
        tensors: the tensors of an adapter that exists, by qualified name. Without them, new ones are made.
        adapter_name: the name that the user gives the adapter.
    """

    variant: Variant
    adapter: int
    names: tuple[str, ...]
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    adapter_name: str = DEFAULT

    def run(self, gm: fx.GraphModule) -> int:
        account = account_for(gm)
        present = [insertion for around in account.insertions.values() for insertion in around]
        number = first_number = 1 + max((insertion.call for insertion in present), default=-1)
        fragments: Remembered[Fragment] = Remembered()
        passed: Remembered[PassedTensors] = Remembered()
        config = json.dumps(to_config(self.variant))
        flow = follow_rows(gm.graph) if self.variant.slots else None
        moved: dict[fx.Node, fx.Node] = {}  # an adapted output may be the input of a call found before
        for site in account.sites:
            if site.name not in self.names:
                continue
            inner = {insertion.adapter: insertion.adapter_name for insertion in account.around(site)}
            if self.adapter in inner:
                continue
            site = replace(site, roles=self.roles.get(site.name, site.roles))
            placement = Placement.of(self.variant, self.adapter, site, inner.values(), self.adapter_name)
            self._register(gm, site, placement)
            slots = placement.local.slots
            for call in site.calls:
                here, x, y = surrounding(account.around(site), moved.get(call.x, call.x), call.y)
                around, at_call = replace(call, x=x, y=y), site
                if slots and flow is not None:
                    at_call = site.with_bank(slots, batch_dim(flow, call.y, site.name))
                    around = replace(around, routing=(ids_input(gm.graph),))
                fragment = fragment_at(gm, at_call, placement, around, fragments)
                if fragment.replaced and inner:
                    raise not_innermost(type(self.variant).__name__, site.name)
                place = (site.name, self.adapter, placement.position)
                insertion = Insertion(
                    *place, number, placement.names, by=self.name, config=config, adapter_name=self.adapter_name
                )
                below = beneath(gm, site, here, placement, passed) if fragment.dependencies.tensors else []
                moved[y] = _splice(gm, at_call, around, placement, fragment, insertion, below)
                number += 1
        return number - first_number

    def _register(self, gm: fx.GraphModule, site: Site, placement: Placement) -> None:
        module_at(gm, site.name)  # which the graph needs for no tensor of the base perhaps, and for the mode
        if self.tensors:
            for name in placement.tensors.values():
                register_tensor(gm, name, self.tensors[name])
            return
        placement.register(gm, site, site_weight(gm, site))


def _splice(
    gm: fx.GraphModule,
    site: Site,
    call: Call,
    placement: Placement,
    fragment: Fragment,
    insertion: Insertion,
    below: Sequence[Below],
) -> fx.Node:
    """Copy `fragment` into the graph around `call`, and return the adapted output.

    The nodes that `forward` runs before it calls `base` go before the frozen linear, the others after it. If it calls
    `base` on its own input, all go after it.
    """
    graph, inputs = gm.graph, fragment.inputs
    values = {fragment.base: call.y, inputs.x: call.x, **dict(zip(inputs.routing, call.routing, strict=True))}
    parameters: dict[fx.Node, str | fx.Node] = {inputs.weight: call.computed_weight or site.weight}
    parameters |= {node: placement.tensors[name] for name, node in inputs.tensors.items()}
    if inputs.bias is not None and site.bias is not None:
        parameters[inputs.bias] = call.computed_bias or site.bias
    if fragment.base_input is inputs.x and fragment.result is fragment.base and not fragment.replaced:
        raise ConfigError(f"{type(placement.variant).__name__}.forward returns base(x) unchanged.")
    stack = _module_stack(call.node, placement)
    copier = partial(_Copier, graph, parameters=parameters, module_stack=stack, insertion=insertion)
    replacing = _replace_tensors(gm, site, call, placement, fragment, copier)
    copies = copier(values, frozen=inputs.frozen(), below=below)
    frozen = span(call.x, call.y)
    # All but what makes the tensors that replace frozen ones; writes in place have no readers, and belong to it.
    done = replacing.difference(ancestors([fragment.base_input, fragment.result]))
    body = [node for node in fragment.graph.nodes if node not in done and node.op not in ("placeholder", "output")]
    if fragment.base_input is not inputs.x:
        split = body.index(fragment.base)
        with graph.inserting_before(_first_draw(call.x, frozen[0])):
            copies.copy_all(body[:split], INLET)
            x = copies.copy(fragment.base_input, INLET)
        for node in frozen:
            node.replace_input_with(call.x, x)
        body = body[split:]
    with graph.inserting_before(call.y.next):
        copies.copy_all(body, OUTLET)
        y = copies.copy(fragment.result, OUTLET)
    if not isinstance(call.x.meta.get("val"), Tensor):
        y.meta.pop("val", None)  # of the made-up input that was traced; what reads `y` would take its shape for known
    if y is not call.y:
        call.y.replace_all_uses_with(y, delete_user_cb=lambda user: user not in copies.inserted)
    return y


def _first_draw(x: fx.Node, frozen: fx.Node) -> fx.Node:
    """Return the first random draw of adapters between `x` and the frozen operation that follows; else the latter.

    Such a draw does not read `x`, as that of which blocks of a rotation are left out. An adapter that is put around
    draws before it, as `wrap` does, so that both draw the same numbers.
    """
    first, node = frozen, frozen.prev
    while node is not x and (is_inserted(node) or node.op == "get_attr"):
        if node.op != "get_attr" and not is_deterministic(node):
            first = node
        node = node.prev
    return first


def _replace_tensors(
    gm: fx.GraphModule,
    site: Site,
    call: Call,
    placement: Placement,
    fragment: Fragment,
    copier: Callable[[dict[fx.Node, fx.Node]], _Copier],
) -> set[fx.Node]:
    """Let `call` read the weight and bias that `forward` gives to `base` in place of the frozen ones.

    Returns:
        The nodes of the fragment that make them.

    Raises:
        ConfigError: `forward` writes to them in place, or something else reads the frozen ones through the same nodes.
    """
    inputs = fragment.inputs
    replacing = set(ancestors(fragment.replaced.values()))
    if any(replacing.intersection(written_roots(gm, node)) for node in fragment.graph.nodes):
        raise ConfigError(
            f"{type(placement.variant).__name__}.forward at {site.name!r} writes in place to the weight or bias that it"
            " gives to base(...). The way out: operations that return new tensors, such as torch.where."
        )
    for name, new in fragment.replaced.items():
        frozen = inputs.weight if name == "weight" or inputs.bias is None else inputs.bias
        for read, readers in _reads(gm, site, call, name).items():
            with gm.graph.inserting_before(min(readers)):
                tensor = copier({frozen: read}).copy(new, TENSOR)
            for reader in readers:
                reader.replace_input_with(read, tensor)
    return replacing


def _reads(gm: fx.GraphModule, site: Site, call: Call, name: str) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes that are the frozen weight or bias `name` of `site`, each with its readers that are of `call`.

    Raises:
        ConfigError: something else reads the tensor through the same nodes.
    """
    path = site.weight if name == "weight" else site.bias
    computed = call.computed_weight if name == "weight" else call.computed_bias
    if computed is not None:
        nodes = [computed]
    else:
        frozen = tensor_of(gm, str(path))
        reads = [node for node in gm.graph.find_nodes(op="get_attr") if not is_inserted(node)]
        nodes = [node for node in reads if attribute_of(gm, str(node.target)) is frozen]
    ends = {call.node, call.y}
    found = {node: [user for user in node.users if leads_only_to(user, ends)] for node in nodes}
    found = {node: readers for node, readers in found.items() if readers}
    if not found:
        raise ConfigError(
            f"The {name} of {site.name!r} cannot be replaced: its call {call.node.name} reads {path!r} through nodes"
            " that something else reads too. The way out: a low-rank adapter there."
        )
    return found


def _module_stack(node: fx.Node, placement: Placement) -> dict[str, Any] | None:
    """Return the modules that an adapter around `node` is in, as fx notes them; None if that is not known.

    The innermost entry has the variant as its type. Who asks for the nodes of an `nn.Linear`, as quantizers do, would
    take those of the adapter for a part of it otherwise. It has the path of the site, and the entry of the site stands
    before it as it was, because `torch.export.unflatten` makes a module of all nodes that agree in the entry.
    """
    stack = node.meta.get("nn_module_stack")
    if stack is None:
        return None
    kind = type(placement.variant)
    name = f"{kind.__module__}.{kind.__qualname__}"
    of_site = {f"{key}/{name}": (path, name) for key, (path, *_) in stack.items() if path == placement.site}
    return {**stack, **of_site}


@dataclass
class _Copier:
    """Copies nodes of a fragment to where the graph inserts, each once, and records the adapter on them.

    Args:
        graph: gets the copies.
        copies: nodes of the fragment that stand for nodes of the graph.
        parameters: placeholders of the fragment that stand for frozen tensors or the adapter's: with the qualified
            names of these, or with the nodes of the graph that compute them from tensors of the module.
        module_stack: the modules that the copies count as part of, as fx notes them.
        insertion: the record for each copy, to which its part is added.
        frozen: the placeholders for the frozen weight and bias.
        below: the adapters that change these before the copies read them, the innermost first.
        inserted: the copies that were made.
    """

    graph: fx.Graph
    copies: dict[fx.Node, fx.Node]
    parameters: Mapping[fx.Node, str | fx.Node]
    module_stack: dict[str, Any] | None
    insertion: Insertion
    frozen: tuple[fx.Node, ...] = ()
    below: Sequence[Below] = ()
    inserted: set[fx.Node] = field(default_factory=set)

    def copy_all(self, nodes: Iterable[fx.Node], part: str) -> None:
        """Insert `nodes` as this part of the adapter."""
        for node in nodes:
            self.copy(node, part)

    def copy(self, node: fx.Node, part: str) -> fx.Node:
        """Return the node of the graph that `node` stands for; insert it if it is not there yet."""
        if self.below and node in self.frozen:
            self._read_below(part)
        if node not in self.copies:
            source = self.parameters.get(node)
            if is_flag(node):  # the site's module has a mode of its own
                source = flag_name(self.insertion.site)
            if isinstance(source, fx.Node):
                # A copy of the computation is parameter work, as what reads it; and it may stand before the original.
                copied = self.graph.node_copy(source, lambda operand: self.copy(operand, part))
            elif source is not None:
                copied = self.graph.create_node("get_attr", source, name=source.replace(".", "_"))
                copied.meta |= {"val": node.meta["val"]} if "val" in node.meta else {}
            else:
                operands = fx.node.map_arg((node.args, node.kwargs), lambda operand: self.copy(operand, part))
                copied = self.graph.create_node(node.op, node.target, *operands, name=self._name(node))
                copied.meta = dict(node.meta)
            if self.module_stack is not None:
                copied.meta["nn_module_stack"] = self.module_stack
            record(copied, replace(self.insertion, part=part))
            self.inserted.add(copied)
            self.copies[node] = copied
        return self.copies[node]

    def _read_below(self, part: str) -> None:
        """Let the copies read what the adapters below make of the frozen tensors.

        These nodes are of the adapters below: without one of them, the next reads what that one read.
        """
        below, self.below = self.below, ()
        read = [self.copy(node, part) for node in self.frozen]
        for each in below:
            tensors = {node: each.placement.tensors[name] for name, node in each.passed.tensors.items()}
            values = dict(zip(each.passed.frozen, read, strict=True))
            copier = _Copier(self.graph, values, tensors, self.module_stack, each.insertion)
            read = [copier.copy(result, PASSED) for result in each.passed.results]
            self.inserted |= copier.inserted
        self.copies.update(zip(self.frozen, read, strict=True))

    def _name(self, node: fx.Node) -> str:
        """Return a name that says the site, the tensor of the adapter that `node` reads if any, and the operation.

        It does not depend on what else is in the graph: `layers_0_q_proj_lora_A_linear`.
        """
        prefix = f"{self.insertion.site}."
        read = (str(self.parameters.get(operand, "")) for operand in node.all_input_nodes)
        tensor = next((name for name in read if name.removeprefix(prefix).startswith(self.insertion.names)), "")
        return f"{tensor or self.insertion.site}_{operation_name(node).strip('_')}".replace(".", "_")
