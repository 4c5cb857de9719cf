"""Insertions: which adapter a node belongs to, written on the node itself.

It lives in `node.meta["custom"]`, which survives `torch.export` and `.pt2` files. So a graph alone tells which nodes
were inserted into it, by which config, and where.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .walk import ancestors

_KEY = "lora_lite_fx"

DEFAULT = "default"
"""The name of adapters that are not given one."""

SHARED = "lora_shared_"
"""The names of tensors that all sites of an adapter share begin with this."""

INLET = "inlet"
"""Part of the nodes before the frozen linear: the last of them replaces its input."""
OUTLET = "outlet"
"""Part of the nodes after it: the last of them replaces its output."""
TENSOR = "tensor"
"""Part of the nodes that replace its weight or bias: the last of them is `type_as(new, frozen)`."""
PASSED = "passed"
"""Part of the nodes that make the weight or bias that an adapter around it reads: the last is `type_as(new, below)`."""


@dataclass(frozen=True)
class Insertion:
    """One adapter at one call of a site: as it is recorded on each of its nodes; read from a graph, with these nodes.

    Other passes may have replaced nodes: a decomposition makes several of one, and none of a cast that does nothing. So
    the nodes at which values enter and leave are not recorded; they follow from who reads whom.

    Args:
        site: qualified name of the adapted site.
        adapter: index of the adapter in the order in which they were added to the model.
        position: index of the adapter among those of its name at the site; its tensors carry it as a suffix.
        call: number of the insertion; one adapter of a site that runs twice has two.
        names: of the adapter's tensors, as its variant calls them.
        part: on a node: `INLET`, `OUTLET`, `TENSOR` or `PASSED`.
        by: the pass that inserted it.
        config: the adapter's config as JSON, on every node, because another pass may replace any of them.
        adapter_name: the name that the user gave the adapter.
        scale: a coefficient of the adapter that is a part of the graph.
        nodes: its nodes in graph order; they are not recorded.
    """

    site: str
    adapter: int
    position: int
    call: int
    names: tuple[str, ...]
    part: str = ""
    by: str = ""
    config: str = ""
    adapter_name: str = DEFAULT
    scale: float = 1.0
    nodes: tuple[fx.Node, ...] = ()

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The adapter's config, as `registry.to_config` writes it."""
        return dict(json.loads(self.config))

    @property
    def variant(self) -> str:
        """The name of the adapter's variant."""
        return str(self.fields["variant"])

    @property
    def tensors(self) -> dict[str, str]:
        """The qualified name of each of the adapter's tensors."""
        return qualified_names(self.site, self.adapter, self.position, self.names, self.adapter_name)

    @property
    def inlet(self) -> fx.Node | None:
        """The node that replaces the input of the frozen linear, or None."""
        return self._exit(INLET)

    @property
    def outlet(self) -> fx.Node | None:
        """The node that replaces the output of the frozen linear, or None."""
        return self._exit(OUTLET)

    @property
    def x(self) -> fx.Node | None:
        """The value that `inlet` replaces, or None."""
        return self._entered(INLET, self.inlet)

    @property
    def y(self) -> fx.Node | None:
        """The value that `outlet` replaces, or None."""
        return self._entered(OUTLET, self.outlet)

    @property
    def tensors_replaced(self) -> dict[fx.Node, fx.Node]:
        """The nodes that replace frozen weights and biases, each with what it replaces."""
        replaced = ((node, replaced_tensor(node)) for node in self.nodes)
        return {node: frozen for node, frozen in replaced if frozen is not None}

    @property
    def tensors_passed(self) -> dict[fx.Node, fx.Node]:
        """The nodes that are weights and biases for adapters around it, each with what it makes them of."""
        return {
            node: node.args[1]
            for node in self._side(PASSED)
            if node.target is torch.ops.aten.type_as.default and isinstance(node.args[1], fx.Node)
        }

    def is_outside(self, node: fx.Node) -> bool:
        """Check that `node` is not one of the adapter's nodes."""
        return node not in self.nodes

    def _side(self, part: str) -> list[fx.Node]:
        return [node for node in self.nodes if (record := recorded(node)) is not None and record.part == part]

    def _exit(self, part: str) -> fx.Node | None:
        """Return the last node of `part` that nodes outside read for its value; sizes are read by everybody."""
        leaving = (node for node in reversed(self._side(part)) if _is_data(node))
        return next((node for node in leaving if any(map(self.is_outside, node.users))), None)

    def _entered(self, part: str, leaving: fx.Node | None) -> fx.Node | None:
        """Return the last value from outside that nodes of `part` read and that `leaving` can stand for, or None."""
        if leaving is None:
            return None
        read = {value for node in self._side(part) for value in node.all_input_nodes if self.is_outside(value)}
        entered = [value for value in read if _is_data(value) and _rank(value) in (None, _rank(leaving))]
        return max(entered, default=None)  # the output of the frozen linear comes after its input


def record(node: fx.Node, insertion: Insertion) -> None:
    """Write `insertion` on `node`."""
    data = {each.name: getattr(insertion, each.name) for each in fields(insertion) if each.name != "nodes"}
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: data}


def recorded(node: fx.Node) -> Insertion | None:
    """Return the adapter that `node` was inserted for, or None if no pass inserted it."""
    data = (node.meta.get("custom") or {}).get(_KEY)
    return Insertion(**data) if data else None


def forget(node: fx.Node) -> None:
    """Take the record off `node`, which then counts as a node of the base."""
    node.meta["custom"] = {key: value for key, value in node.meta["custom"].items() if key != _KEY}
    if not node.meta["custom"]:
        del node.meta["custom"]


def is_inserted(node: fx.Node) -> bool:
    """Check whether a pass inserted `node`."""
    return _KEY in (node.meta.get("custom") or {})


def replaced_tensor(node: fx.Node) -> fx.Node | None:
    """Return the frozen weight or bias in whose place an adapter has put `node`; None for any other node."""
    insertion = recorded(node)
    if insertion is None or insertion.part != TENSOR or node.target is not torch.ops.aten.type_as.default:
        return None
    frozen = node.args[1]
    return frozen if isinstance(frozen, fx.Node) and recorded(frozen) is None else None


def inner_name(node: fx.Node) -> str | None:
    """Return the qualified name of the innermost module that `node` was captured in, or None."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else None


def place_of(node: fx.Node) -> str:
    """Return a name of `node` that a user knows: its site if a pass inserted it, else its module, else its own name."""
    insertion = recorded(node)
    return insertion.site if insertion is not None else inner_name(node) or node.name


def qualified_names(
    site: str, adapter: int, position: int, names: Iterable[str], adapter_name: str = DEFAULT
) -> dict[str, str]:
    """Return the qualified names of an adapter's tensors at a site.

    The names at the second adapter of a site end in `_2`, and so on, and those of a named adapter in its name:
    `lora_A_fr`, `lora_A_2_fr`. Tensors that all sites of an adapter share are at the root of the model, and their
    suffix counts the adapters of the model.
    """
    own = "" if adapter_name == DEFAULT else f"_{adapter_name}"
    return {
        name: f"{name}{_suffix(adapter)}{own}" if name.startswith(SHARED) else f"{site}.{name}{_suffix(position)}{own}"
        for name in names
    }


def _suffix(index: int) -> str:
    return f"_{index + 1}" if index else ""


def insertions(graph: fx.Graph) -> list[Insertion]:
    """Return all adapters in `graph` and the graphs inside it, in the order in which they were inserted."""
    by_call: dict[int, list[tuple[fx.Node, Insertion]]] = {}
    for node in _with_inner(graph):
        if (insertion := recorded(node)) is not None:
            by_call.setdefault(insertion.call, []).append((node, insertion))
    found = []
    for _, members in sorted(by_call.items()):
        first, nodes = members[0][1], tuple(node for node, _ in members)
        # torch.export writes on the reads of parameters what the graph had that it was given, without scales.
        scale = next((insertion.scale for node, insertion in members if node.op == "call_function"), first.scale)
        found.append(replace(first, names=tuple(first.names), part="", scale=scale, nodes=nodes))
    return found


def _with_inner(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes of `graph`, and those of the regions that `torch.export` has moved into graphs of their own."""
    for node in graph.nodes:
        yield node
        if node.op == "get_attr" and isinstance(
            body := getattr(graph.owning_module, node.target, None), fx.GraphModule
        ):
            yield from _with_inner(body.graph)


def take_out(inserted: Iterable[Insertion]) -> dict[fx.Node, fx.Node]:
    """Let the readers of each adapter read what it replaces, and erase what nothing reads then.

    Returns:
        The nodes by which values left the adapters, each with the value that it stood for.
    """
    replaced: dict[fx.Node, fx.Node] = {}
    for insertion in inserted:
        sides = ((insertion.inlet, insertion.x), (insertion.outlet, insertion.y))
        tensors = (*insertion.tensors_replaced.items(), *insertion.tensors_passed.items())
        for leaving, entered in (*tensors, *sides):
            if leaving is not None and entered is not None:
                leaving.replace_all_uses_with(entered, delete_user_cb=insertion.is_outside)
                replaced[leaving] = entered
        for node in reversed(insertion.nodes):
            if not node.users:
                node.graph.erase_node(node)
    return replaced


def is_size(node: fx.Node) -> bool:
    """Check whether `node` is a number, such as the size of a tensor; where passes share sizes, all may read them."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def _is_read(tensors: Container[fx.Node], x: fx.Node, y: fx.Node) -> bool:
    """Check whether the call from `x` to `y` reads one of `tensors`."""
    return bool(tensors) and any(node in tensors for node in ancestors([y], lambda node: node is x))


def leads_only_to(node: fx.Node, ends: Container[fx.Node]) -> bool:
    """Return whether `node` is one of `ends`, or a view or cast of a tensor that only they read."""
    if node in ends:
        return True
    read = [operand for operand in node.all_input_nodes if not is_size(operand)]
    return len(read) == 1 and bool(node.users) and all(leads_only_to(user, ends) for user in node.users)


def _is_data(node: fx.Node) -> bool:
    """Check whether `node` is neither a number nor a tensor of the module, perhaps reshaped or cast or adapted."""
    if is_size(node):
        return False
    if (insertion := recorded(node)) is not None and insertion.part == PASSED:
        return False
    while node.op == "call_function":
        read = [operand for operand in node.all_input_nodes if not is_size(operand)]
        if len(read) != 1:
            break
        node = read[0]
    return node.op != "get_attr"


def _rank(node: fx.Node) -> int | None:
    """Return the number of dimensions of `node`, or None if it is not known."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def surrounding(adapters: Iterable[Insertion], x: fx.Node, y: fx.Node) -> tuple[list[Insertion], fx.Node, fx.Node]:
    """Find the adapters around one call of a site.

    Args:
        adapters: the adapters of the site, at all its calls, the innermost first.
        x: the input of the frozen linear at this call.
        y: its output.

    Returns:
        Those of the adapters that are at this call; and the input and the output of the call with them around it.
    """
    around = []
    for insertion in adapters:
        inlet, outlet = insertion.inlet, insertion.outlet
        is_here = inlet or outlet or _is_read(insertion.tensors_replaced, x, y)
        if (inlet or x) is x and (outlet is None or insertion.y is y) and is_here:
            around.append(insertion)
            x, y = insertion.x or x, outlet or y
    return around, x, y
