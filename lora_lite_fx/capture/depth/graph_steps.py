"""Read the graph of a model as a program of `repeats.py`: its nodes as steps, with names for what they read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.tensors import tensor_of
from .operators import value_key
from .repeats import Block, NotRepeated, Place, Step, place_of_tensor

CONSTANT = re.compile(r"(.*\.)?lifted_tensor_\d+$")
"""How torch.export calls the constants that it finds. It numbers them."""


def names_of_tensors(gm: fx.GraphModule, reads: Sequence[fx.Node], stacks: Mapping[str, int]) -> dict[fx.Node, str]:
    """Return the name of what each of these nodes reads.

    A constant of a layer is named by the layer, its number among the constants of the layer and its value, because
    torch.export numbers the constants of all layers.
    """
    names: dict[fx.Node, str] = {}
    counts: dict[Block, int] = {}
    for node in reads:
        target = names[node] = str(node.target)
        layers = {layer for user in node.users for layer in _layers(user, stacks)[0]}
        if not CONSTANT.match(target) or len(layers) != 1 or not stacks:
            continue
        (layer,) = layers
        counts[layer] = counts.get(layer, -1) + 1
        names[node] = f"{layer[0]}.{layer[1]}.constant {counts[layer]} {value_key(tensor_of(gm, target))}"
    return names


def steps_of(
    nodes: Sequence[fx.Node], tensors: Mapping[fx.Node, str], stacks: Mapping[str, int], sizes: Mapping[str, Place]
) -> list[Step]:
    """Return nodes as the steps of a program.

    Args:
        nodes: what is computed.
        tensors: the nodes that read tensors and inputs, and how these are called.
        stacks: the stacks of layers, with their sizes.
        sizes: symbols of sizes of a layer's own inputs, which are others in each layer.
    """
    number = {node: index for index, node in enumerate(nodes)}
    steps = []
    for node in nodes:
        reads: list[tuple[int | str, int]] = []

        def read(operand: fx.Node, reads: list[tuple[int | str, int]] = reads) -> str:
            reads.append((tensors[operand] if operand in tensors else number[operand], 0))
            return "%"

        arguments = fx.map_arg((node.args, node.kwargs), read)
        inside, modules = _layers(node, stacks)
        if inside and node.op != "call_function":
            raise NotRepeated(f"a layer of {inside[0][0]} calls a module")
        own = {symbol: place for symbol, place in sizes.items() if inside and place[:2] == inside[0]}
        what = (str(node.target), repr(arguments), modules, _described(node.meta.get("val"), own)) if stacks else ()
        is_size = isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
        steps.append(Step(what, tuple(reads), inside, is_size))
    return steps


def _layers(node: fx.Node, stacks: Mapping[str, int]) -> tuple[tuple[Block, ...], tuple[Any, ...]]:
    """Return the layer that a node was called in, and its modules; those in the layer by their name in it."""
    inside: tuple[Block, ...] = ()
    modules = []
    for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
        place = place_of_tensor(f"{path}.", stacks)
        if place.stack and not inside:
            inside = ((place.stack, place.member),)
        modules.append(("in the layer", place.within) if (place.stack, place.member) in inside else ("", path))
    return inside, tuple(modules)


def _described(value: Any, own: Mapping[str, Place]) -> Any:
    """Return what is known of the value of a node, for comparisons.

    Args:
        value: of the node.
        own: symbols of sizes that are to be called by their places.
    """
    if isinstance(value, Tensor):
        sizes = tuple(_described(size, own) for size in (*value.shape, *value.stride()))
        return str(value.dtype), str(value.device), sizes
    if isinstance(value, (tuple, list)):
        return tuple(_described(item, own) for item in value)
    if own and isinstance(value, torch.SymInt):
        import sympy

        expression = value.node.expr  # nothing public tells how a size is computed of others
        named = {
            symbol: sympy.Symbol(f"{place.within} {place.result}")
            for symbol in expression.free_symbols
            if (place := own.get(str(symbol))) is not None
        }
        return str(expression.xreplace(named))
    return str(value)
