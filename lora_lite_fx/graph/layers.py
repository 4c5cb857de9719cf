"""The layer of a node, and the nodes of a layer in pieces that can stand at one place.

A layer, as in the field `layers` of a config, is all modules with the same qualified name up to the first number in it.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from functools import partial
from itertools import accumulate

from torch import fx

from ..compat.torch import OpOverload
from ..errors import CaptureError
from .writes import overwritten_tensors

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")

A_LAYER = (
    "A layer is an element of a ModuleList or Sequential, with a number in its qualified name as in model.layers.0."
)


def layer_of(node: fx.Node) -> str | None:
    """Return the name of the layer that `node` belongs to, with the number of the layer's call; None outside layers."""
    if not node.op.startswith("call_"):
        return None
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        if match := _LAYER.match(path):
            return f"{match[0]}@{key.partition('@')[2]}"
    return None


def is_layer(name: str) -> bool:
    """Check whether a module of that qualified name is a layer: the first number in the name is its last part."""
    match = _LAYER.match(name)
    return match is not None and match[0] == name


def computes_weights(name: str) -> bool:
    """Check whether a module of that qualified name belongs to the parametrizations of torch, which compute weights."""
    return "parametrizations" in name.split(".")


def call_around(node: fx.Node, called: Container[str] = ()) -> str | None:
    """Return the module that is called to run `node`, with the number of its call; None if none is.

    Args:
        node: the node.
        called: the qualified names of modules that are called, besides layers.
    """
    return layer_of(node) or (module_call_of(node, called) if called else None)


def calls_in(gm: fx.GraphModule) -> Callable[[fx.Node], str | None]:
    """Return `call_around` for the nodes of a program, which calls layers, and modules on which hooks stand."""
    return partial(call_around, called=gm.meta.get("called", ()))


def module_call_of(node: fx.Node, names: Container[str]) -> str | None:
    """Return the outermost module among `names` that `node` was captured in, with the number of its call; or None."""
    if node.op.startswith("call_"):
        for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            if path in names:
                return f"{path}@{key.partition('@')[2]}"
    return None


def require_layers(gm: fx.GraphModule) -> None:
    """Raise `CaptureError` if the graph has no layers to checkpoint."""
    if not pieces_of(gm, gm.graph):
        raise CaptureError(
            f"checkpoint_layers: the model has no layers to checkpoint. {A_LAYER} The way out: checkpoint_layers=False."
        )


def pieces_of(gm: fx.GraphModule, graph: fx.Graph, also: Collection[str] = ()) -> list[tuple[str, list[fx.Node]]]:
    """Return the nodes of each layer, in pieces that can run as one, and run again in the backward pass.

    Args:
        gm: has the tensors.
        graph: its graph, or a program derived from it.
        also: qualified names of modules outside layers that are to be pieces too.

    Returns:
        The qualified name of the layer, and its nodes in graph order, for each piece. A layer that runs twice has two.
    """

    place = partial(call_around, called=also)
    overwritten = overwritten_tensors(gm, graph)
    outside: set[fx.Node] = set()
    while True:
        pieces = list(_pieces(graph, outside, place))
        number_of: dict[fx.Node | None, int] = {node: index for index, piece in enumerate(pieces) for node in piece}
        # A piece may overwrite what it made itself; to be run again, it must not read what is overwritten elsewhere.
        torn: set[fx.Node] = set()
        for made_by, readers in overwritten:
            places = {number_of.get(reader) for reader in readers}
            if places not in ({None}, {number_of.get(made_by)}):
                torn.update(readers)
        if not torn:
            return [(str(place(piece[0])).rpartition("@")[0], piece) for piece in pieces]
        outside |= torn


def whole_of(gm: fx.GraphModule, graph: fx.Graph, also: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the modules that a program calls once, with all that the module computes.

    Hooks on others do not act as on the model. They may still have a piece: beside what overwrites tensors, as a
    batch norm its statistics, or beside layers inside. So may what computes weights, which passes move to the front.

    Args:
        gm, graph, also: as for `pieces_of`.
    """
    sizes = Counter(name for node in graph.nodes if node.op.startswith("call_") for name in _modules_around(node))
    whole = (path for path, members in pieces_of(gm, graph, also) if len(members) == sizes[path])
    return frozenset(path for path in whole if not computes_weights(path))


def _modules_around(node: fx.Node) -> set[str]:
    """Return the qualified names of the modules that `node` was captured in."""
    paths = (path.split(".") for path, *_ in (node.meta.get("nn_module_stack") or {}).values())
    return {name for path in paths for name in accumulate(path, "{}.{}".format)}


def _pieces(graph: fx.Graph, outside: set[fx.Node], place: Callable[[fx.Node], str | None]) -> Iterator[list[fx.Node]]:
    """Yield the nodes of each layer but those in `outside`, cut at nodes outside the layer that must not run before it.

    So a piece can run at the place of its last node. The nodes of others that stand between its nodes run before it.
    """
    current: str | None = None
    piece: dict[fx.Node, None] = {}
    for node in graph.nodes:
        layer = None if node in outside else place(node)
        waits = layer or _is_impure(node) or any(read in piece for read in node.all_input_nodes)
        if piece and layer != current and waits:
            yield list(piece)
            piece = {}
        if layer:
            current = layer
            piece[node] = None
    if piece:
        yield list(piece)


def _is_impure(node: fx.Node) -> bool:
    """Check whether `node` draws random numbers or writes in place, so that its turn matters; if unknown, it may."""
    if isinstance(node.target, OpOverload):
        return node.is_impure()
    return node.op.startswith("call_") and getattr(node.target, "__module__", "") != operator.mul.__module__
