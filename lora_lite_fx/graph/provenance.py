"""Provenance: which adapter a node belongs to, written on the node itself.

It lives in `node.meta["custom"]`, which survives `torch.export` and `.pt2` files. So a graph alone tells which nodes
were inserted into it, by which config, and where.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

_KEY = "lora_lite_fx"

SHARED = "lora_shared_"
"""The names of tensors that all sites of an adapter share begin with this."""

INLET = "inlet"
"""Part of the node that replaces the input of the frozen linear."""
OUTLET = "outlet"
"""Part of the node that replaces its output."""


@dataclass(frozen=True)
class Provenance:
    """The record of why a node is in the graph.

    Args:
        site: qualified name of the adapted site.
        adapter: index of the adapter in the order in which they were added to the model.
        position: index of the adapter among those of its site; its tensors carry it as a suffix.
        call: number of the insertion; one adapter of a site that runs twice has two.
        names: of the adapter's tensors, as its variant calls them.
        part: `INLET`, `OUTLET`, or empty for the nodes in between.
        by: the pass that inserted it.
        config: the adapter's config as JSON, on inlets and outlets.
    """

    site: str
    adapter: int
    position: int
    call: int
    names: tuple[str, ...]
    part: str = ""
    by: str = ""
    config: str = ""


def record(node: fx.Node, provenance: Provenance) -> None:
    """Write `provenance` on `node`."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: asdict(provenance)}


def recorded(node: fx.Node) -> Provenance | None:
    """Return the provenance of `node`, or None if no pass inserted it."""
    data = (node.meta.get("custom") or {}).get(_KEY)
    return Provenance(**data) if data else None


def is_inserted(node: fx.Node) -> bool:
    """Check whether a pass inserted `node`."""
    return _KEY in (node.meta.get("custom") or {})


def inner_name(node: fx.Node) -> str | None:
    """Return the qualified name of the innermost module that `node` was captured in, or None."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else None


def place_of(node: fx.Node) -> str:
    """Return a name of `node` that a user knows: its site if a pass inserted it, else its module, else its own name."""
    provenance = recorded(node)
    return provenance.site if provenance is not None else inner_name(node) or node.name


@dataclass(frozen=True)
class Insertion:
    """One adapter at one call of a site, as found in a graph.

    Args:
        site, adapter, position, call, names: as in `Provenance`.
        config: the adapter's config, as `variant.to_config` writes it.
        nodes: its nodes in graph order.
        inlet: the node that replaces the input of the frozen linear, or None.
        outlet: the node that replaces its output, or None.
    """

    site: str
    adapter: int
    position: int
    call: int
    names: tuple[str, ...]
    config: dict[str, Any]
    nodes: tuple[fx.Node, ...]
    inlet: fx.Node | None
    outlet: fx.Node | None

    @property
    def tensors(self) -> dict[str, str]:
        """The qualified name of each of the adapter's tensors."""
        return qualified_names(self.site, self.adapter, self.position, self.names)

    def is_outside(self, node: fx.Node) -> bool:
        """Check that `node` is not one of the adapter's nodes."""
        return node not in self.nodes

    @property
    def entered_by(self) -> list[fx.Node]:
        """The values that the adapter reads from outside, constants left out, in graph order.

        They are the site's input, if the adapter reads it, and the frozen linear's output, if the adapter changes it.
        The output comes last, because it is computed from the input.
        """
        members = set(self.nodes)
        read = {value for node in self.nodes for value in node.all_input_nodes}
        return sorted(value for value in read - members if not _is_constant(value))


def qualified_names(site: str, adapter: int, position: int, names: Iterable[str]) -> dict[str, str]:
    """Return the qualified names of an adapter's tensors at a site.

    The names at a site's second adapter end in `_2`, and so on. Tensors that all sites of an adapter share are at the
    root of the model, and their suffix counts the adapters of the model.
    """
    return {
        name: f"{name}{_suffix(adapter)}" if name.startswith(SHARED) else f"{site}.{name}{_suffix(position)}"
        for name in names
    }


def _suffix(index: int) -> str:
    return f"_{index + 1}" if index else ""


def insertions(graph: fx.Graph) -> list[Insertion]:
    """Return all adapters in `graph` and the graphs inside it, in the order in which they were inserted."""
    by_call: dict[int, list[tuple[fx.Node, Provenance]]] = {}
    for node in _with_inner(graph):
        if (provenance := recorded(node)) is not None:
            by_call.setdefault(provenance.call, []).append((node, provenance))
    return [_insertion(members) for _, members in sorted(by_call.items())]


def _with_inner(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes of `graph`, and those of the regions that `torch.export` has moved into graphs of their own."""
    for node in graph.nodes:
        yield node
        if node.op == "get_attr" and isinstance(
            body := getattr(graph.owning_module, node.target, None), fx.GraphModule
        ):
            yield from _with_inner(body.graph)


def _insertion(members: list[tuple[fx.Node, Provenance]]) -> Insertion:
    first = members[0][1]
    # Where re-capture split a node in two, both have its record: the last one is the result.
    parts = {provenance.part: node for node, provenance in members}
    config = next(provenance.config for _, provenance in members if provenance.config)
    return Insertion(
        first.site,
        first.adapter,
        first.position,
        first.call,
        tuple(first.names),
        json.loads(config),
        tuple(node for node, _ in members),
        parts.get(INLET),
        parts.get(OUTLET),
    )


def _is_constant(node: fx.Node) -> bool:
    """Check whether `node` is a tensor of the module, perhaps reshaped or cast."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def outermost(adapters: Iterable[Insertion], x: fx.Node, y: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the input and output of a site's call with `adapters` around it, from those of the frozen linear."""
    for insertion in adapters:
        if insertion.inlet is x:
            x = insertion.entered_by[0]
        if insertion.outlet is not None and insertion.entered_by[-1] is y:
            y = insertion.outlet
    return x, y
