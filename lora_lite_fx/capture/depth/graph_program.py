"""Read the graph of a shortened model as a program, whose steps are the nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.tensors import tensor_of
from .operators import value_key
from .program import (
    NotRepeated,
    Part,
    Place,
    PlacedStep,
    Program,
    Read,
    Step,
    input_name,
    number_of_input,
    place_of_tensor,
)
from .repetition import Repetition, StampedResult, captured_layers, last_periods

CONSTANT = re.compile(r"(.*\.)?lifted_tensor_\d+$")
"""How torch.export calls the constants that it finds. It numbers them."""
_SYMBOL = re.compile(r"\bs\d+\b")
"""How torch.export calls the sizes that it leaves open."""


@dataclass(frozen=True)
class Layers:
    """How the layers of a model repeat in a call, as a run of all of them has shown.

    Args:
        repetitions: of the stacks that are shortened, by their names.
        inputs: names for the inputs of single layers, see `Program`.
        results: where each result of the model comes from; None for the results of the graph as they are.
        returned: what these are leaves of.
    """

    repetitions: Mapping[str, Repetition] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    results: tuple[StampedResult, ...] | None = None
    returned: Any = None

    def inputs_left_out(self) -> dict[int, int]:
        """Return the numbers of the inputs of layers that are left out, with those of their templates."""
        stacks = self.repetitions
        sizes = {name: repetition.layers for name, repetition in stacks.items()}
        places = {number_of_input(name): place_of_tensor(path, sizes) for name, path in self.inputs.items()}
        numbers = {place: number for number, place in places.items()}
        return {
            number: numbers[place._replace(layer=stacks[place.stack].template(place.layer))]
            for number, place in places.items()
            if place.layer >= stacks[place.stack].captured
        }


class GraphProgram:
    """The nodes of a graph by what they are, with their places.

    Args:
        gm: the graph of a model with shortened stacks. Its sizes are read anew, in place.
        layers: how they repeat.

    Raises:
        NotRepeated: a captured layer is not the one before it again.
    """

    def __init__(self, gm: fx.GraphModule, layers: Layers) -> None:
        stacks = captured_layers(layers.repetitions)
        self.inputs = gm.graph.find_nodes(op="placeholder", sort=True)
        self.tensors = gm.graph.find_nodes(op="get_attr", sort=True)
        _read_sizes_of_first(self.inputs)
        names = _names_of_tensors(gm, self.tensors, stacks)
        for number, node in enumerate(self.inputs):
            names[node] = layers.inputs.get(input_name(number), input_name(number))
        self.places = {node: place_of_tensor(name, stacks) for node, name in names.items()}
        """The places of inputs, of tensors, and of sizes of the inputs of single layers, which are read before all."""
        computed = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        self.sizes = [node for node in computed if self._is_size_in_layer(node)]
        for node in self.sizes:
            names[node] = f"{names[node.all_input_nodes[0]]} {node.args[1:]}"
            self.places[node] = place_of_tensor(names[node], stacks)
            _write_first(node)
        self.nodes = [node for node in computed if node not in self.places]
        """The nodes that are steps of the program."""
        self.number = {node: number for number, node in enumerate(self.nodes)}
        self.program = Program(self._steps(names, stacks), stacks, inputs={})
        self.templates: dict[Part, list[tuple[PlacedStep, PlacedStep]]] = {}
        """The steps of the templates, each with that of one period before."""
        for stack, repetition in layers.repetitions.items():
            if (templates := last_periods(self.program, repetition)) is None:
                raise NotRepeated(f"the graphs of the captured layers of {stack} differ")
            self.templates |= {(stack, layer): steps for layer, steps in templates.items()}

    def _steps(self, names: Mapping[fx.Node, str], stacks: Mapping[str, int]) -> list[Step]:
        """Return the nodes as steps; `names` has those that read tensors and inputs."""
        symbols = self._symbols_of_layers()
        steps = []
        for node in self.nodes:
            reads: list[Read] = []

            def read(operand: fx.Node, reads: list[Read] = reads) -> str:
                reads.append((names[operand] if operand in names else self.number[operand], 0))
                return "%"

            arguments = fx.map_arg((node.args, node.kwargs), read)
            layers, modules = _modules_of(node, stacks)
            if layers and node.op != "call_function":
                raise NotRepeated(f"a layer of {layers[0][0]} calls a module")
            in_layer = {symbol: place for symbol, place in symbols.items() if layers and place[:2] == layers[0]}
            value = node.meta.get("val")
            what = (str(node.target), repr(arguments), modules, _described(value, in_layer)) if stacks else ()
            is_size = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
            steps.append(Step(what, tuple(reads), layers, is_size))
        return steps

    def _symbols_of_layers(self) -> dict[str, Place]:
        """Return the symbols of sizes that inputs of one layer alone have, each with its place in the layer."""
        places: dict[str, set[Place]] = {}
        for node in self.inputs:
            for dim, size in enumerate(_sizes(node)):
                for symbol in _SYMBOL.findall(str(size)):
                    places.setdefault(symbol, set()).add(self.places[node]._replace(result=dim))
        return {
            symbol: min(having)
            for symbol, having in places.items()
            if len({place[:2] for place in having}) == 1 and min(having).stack
        }

    def _is_size_in_layer(self, node: fx.Node) -> bool:
        """Tell whether a node reads a size of an input of one layer. These nodes stand before all layers."""
        if node.target is not torch.ops.aten.sym_size.int:
            return False
        (source,) = node.all_input_nodes
        return source.op == "placeholder" and bool(self.places[source].stack)


def _sizes(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _read_sizes_of_first(inputs: Sequence[fx.Node]) -> None:
    """Read each size of the first input that has it, in place, because torch.export reads one that may be left out."""
    first: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        for dim, size in enumerate(_sizes(node)):
            first.setdefault(str(size), (node, dim))
    for node in inputs:
        for user in [user for user in node.users if user.target is torch.ops.aten.sym_size.int]:
            user.args = first[str(node.meta["val"].shape[user.args[1]])]


def _write_first(size: fx.Node) -> None:
    """Let sums and products of sizes name this one first: torch.export orders them by names, which no layer shares."""
    for user in list(size.users):
        if user.target in (operator.add, operator.mul) and user.args[-1] is size:
            user.args = (size, *user.args[:-1])


def _names_of_tensors(gm: fx.GraphModule, reads: Sequence[fx.Node], stacks: Mapping[str, int]) -> dict[fx.Node, str]:
    """Return the name of what each of these nodes reads.

    A constant of a layer is named by the layer, its number among the constants of the layer and its value, because
    torch.export numbers the constants of all layers.
    """
    names: dict[fx.Node, str] = {}
    counts: dict[Part, int] = {}
    for node in reads:
        target = names[node] = str(node.target)
        layers = {layer for user in node.users for layer in _modules_of(user, stacks)[0]}
        if not CONSTANT.match(target) or len(layers) != 1:
            continue
        (layer,) = layers
        counts[layer] = counts.get(layer, -1) + 1
        names[node] = f"{layer[0]}.{layer[1]}.constant {counts[layer]} {value_key(tensor_of(gm, target))}"
    return names


def _modules_of(node: fx.Node, stacks: Mapping[str, int]) -> tuple[tuple[Part, ...], tuple[Any, ...]]:
    """Return the layer that a node was called in, and its modules; those in the layer by their name in it."""
    layers: tuple[Part, ...] = ()
    modules = []
    for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
        place = place_of_tensor(f"{path}.", stacks)
        if place.stack and not layers:
            layers = ((place.stack, place.layer),)
        modules.append(("in the layer", place.within) if (place.stack, place.layer) in layers else ("", path))
    return layers, tuple(modules)


def _described(value: Any, symbols: Mapping[str, Place]) -> Any:
    """Return what is known of the value of a node, for comparisons; these symbols are called by their places."""
    if isinstance(value, Tensor):
        sizes = tuple(_described(size, symbols) for size in (*value.shape, *value.stride()))
        return str(value.dtype), str(value.device), sizes
    if isinstance(value, (tuple, list)):
        return tuple(_described(item, symbols) for item in value)
    if symbols and isinstance(value, torch.SymInt):
        import sympy

        expression = value.node.expr  # nothing public tells how a size is computed of others
        named = {
            symbol: sympy.Symbol(f"{place.within} {place.result}")
            for symbol in expression.free_symbols
            if (place := symbols.get(str(symbol))) is not None
        }
        return str(expression.xreplace(named))
    return str(value)
