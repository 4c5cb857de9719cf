"""Complete the graph of a model whose stacks of layers were shortened: stamp the layers that were left out."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...compat.torch import children_of, codegen_of, empty_like
from ...graph.tensors import register_tensor, tensor_of
from ..export import GUARDS, guard_sizes
from ..graph_calls import return_as
from .graph_steps import CONSTANT, names_of_tensors, steps_of
from .repeats import (
    Blocks,
    NotRepeated,
    Place,
    Relations,
    Repetition,
    input_name,
    number_of_input,
    place_of_tensor,
    relations_of,
)
from .stamped_results import StampedResult

_NUMBER = re.compile(r"_\d+$")
_SYMBOL = re.compile(r"\bs\d+\b")
"""How torch.export calls the sizes that it leaves open."""


@dataclass(frozen=True)
class Layers:
    """How the layers of a model repeat in a call, as a run of all of them has shown.

    Args:
        repetitions: of the stacks that are shortened.
        inputs: names for the inputs of single layers, see `Blocks`.
        results: where each result of the model comes from; None for the results of the graph as they are.
        returned: what these are leaves of.
    """

    repetitions: tuple[Repetition, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    results: tuple[StampedResult, ...] | None = None
    returned: Any = None

    def templates(self) -> dict[int, int]:
        """Return the numbers of the inputs of layers that are left out, with those of their templates."""
        stacks = {repetition.stack: repetition for repetition in self.repetitions}
        sizes = {name: repetition.members for name, repetition in stacks.items()}
        places = {number_of_input(name): place_of_tensor(path, sizes) for name, path in self.inputs.items()}
        numbers = {place: number for number, place in places.items()}
        return {
            number: numbers[place._replace(member=stacks[place.stack].template(place.member))]
            for number, place in places.items()
            if place.member >= stacks[place.stack].captured
        }


def stamp(gm: fx.GraphModule, model: nn.Module, layers: Layers) -> None:
    """Let `gm` compute all layers of `model`, in place.

    Args:
        gm: the graph of the model with shortened stacks.
        model: has all layers; the graph gets their tensors.
        layers: how they repeat.

    Raises:
        NotRepeated: a captured layer is not the one before it again. `gm` is unchanged.
    """
    _Stamping(gm, model, layers).run()


def number_nodes(gm: fx.GraphModule) -> None:
    """Name each node by its operator and by how many nodes of that operator stand before it, in place.

    `torch.export` counts nodes too that it removes, of which there are more in a deeper model.
    """
    _Stamping(gm, gm, Layers()).run()


class _Stamping:
    """The graph of all layers, while it is made."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module, layers: Layers) -> None:
        self.gm = gm
        self.layers = layers
        self.templates = layers.templates()
        self.repetitions = {repetition.stack: repetition for repetition in layers.repetitions}
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= model.named_buffers(remove_duplicate=False)
        self.inputs = gm.graph.find_nodes(op="placeholder", sort=True)
        self.reads = gm.graph.find_nodes(op="get_attr", sort=True)
        self.output = gm.graph.output_node()
        _read_sizes_of_first(self.inputs)
        stacks = {name: repetition.captured for name, repetition in self.repetitions.items()}
        names = names_of_tensors(gm, self.reads, stacks)
        for number, node in enumerate(self.inputs):
            names[node] = layers.inputs.get(input_name(number), input_name(number))
        self.places = {node: place_of_tensor(name, stacks) for node, name in names.items()}
        computed = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        self.sizes = [node for node in computed if self._is_size_of_own_input(node)]
        for node in self.sizes:
            names[node] = f"{names[node.all_input_nodes[0]]} {node.args[1:]}"
            self.places[node] = place_of_tensor(names[node], stacks)
            _write_first(node)
        self.nodes = [node for node in computed if node not in self.places]
        self.number = {node: number for number, node in enumerate(self.nodes)}
        self.program = Blocks(steps_of(self.nodes, names, stacks, self._own_sizes()), stacks, inputs={})
        self.relations: dict[str, Relations] = {}
        for name, repetition in self.repetitions.items():
            relations = relations_of(self.program, repetition)
            if relations is None:
                raise NotRepeated(f"the graphs of the captured layers of {name} differ")
            self.relations[name] = relations
        self.graph = empty_like(gm.graph)
        self.made: dict[Place, fx.Node] = {}
        self.registered: dict[str, Tensor] = {}
        self.constants: list[tuple[str, Tensor]] = []

    def _own_sizes(self) -> dict[str, Place]:
        """Return the symbols of sizes that inputs of single layers alone have, each with its place in the layer."""
        owners: dict[str, set[Place]] = {}
        for node in self.inputs:
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                for symbol in _SYMBOL.findall(str(size)):
                    owners.setdefault(symbol, set()).add(self.places[node]._replace(result=dim))
        return {
            symbol: min(places)
            for symbol, places in owners.items()
            if len({place[:2] for place in places}) == 1 and min(places).stack
        }

    def _is_size_of_own_input(self, node: fx.Node) -> bool:
        """Tell whether a node reads a size of an input of one layer. These nodes stand before all layers."""
        if node.target is not torch.ops.aten.sym_size.int:
            return False
        place = self.places.get(node.all_input_nodes[0])
        return place is not None and bool(place.stack) and node.all_input_nodes[0].op == "placeholder"

    def run(self) -> None:
        self._read_tensors()  # before the inputs, as torch.export: parameter work stands between
        self._take_inputs()
        for node in self.gm.graph.nodes:
            if node in self.sizes:
                self._read_size(node)
            if node not in self.number:
                continue
            number = self.number[node]
            block = self.program.block_of[number]
            self._copy(node, number, block[1])
            repetition = self.repetitions.get(block[0])
            if repetition is None or block[1] != repetition.captured - 1:
                continue
            if number == self.program.members[block][-1]:
                for member in range(repetition.captured, repetition.members):
                    self._stamp(repetition, member)
        self._return()
        self.graph.set_codegen(codegen_of(self.gm.graph))
        if self.layers.returned is not None:
            return_as(self.graph, self.layers.returned)
        for name, tensor in self.registered.items():
            register_tensor(self.gm, name, tensor)
        for name, tensor in self.constants:
            _set_constant(self.gm, name, tensor)
        if self.templates:
            guard_sizes(self.gm, self.templates)
        self.gm.graph = self.graph

    # What goes in and out.

    def _take_inputs(self) -> None:
        """Make the inputs. The shortened model does not read those of layers that it lacks, so it knows no sizes."""
        of_graph = {self.output, *self.gm.graph.find_nodes(op="call_module", target=GUARDS)}
        for number, node in enumerate(self.inputs):
            template = self.templates.get(number)
            if template is not None and not of_graph.issuperset(node.users):
                raise NotRepeated(f"the input {node.name} is not one of a layer that was left out")
            self.made[self.places[node]] = new = self._create(node, node.target, node.args, node.kwargs, node.name)
            if template is not None:
                new.meta["val"] = self.inputs[template].meta["val"]

    def _read_size(self, node: fx.Node) -> None:
        """Make the node that reads a size of an input of a layer; after the last one, those of the others."""
        self._copy_size(node, self.places[node].member)
        for repetition in self.repetitions.values():
            templates = [each for each in self.sizes if repetition.in_last_period(self.places[each])]
            if templates[-1:] != [node]:
                continue
            for member in range(repetition.captured, repetition.members):
                for template in templates:
                    if self.places[template].member == repetition.template(member):
                        self._copy_size(template, member)

    def _copy_size(self, node: fx.Node, member: int) -> None:
        of_input = self.made[self.places[node.all_input_nodes[0]]._replace(member=member)]
        new = self._create(node, node.target, (of_input, *node.args[1:]), {}, _NUMBER.sub("", node.name))
        self.made[self.places[node]._replace(member=member)] = new

    def _return(self) -> None:
        leaves: Any = self.output.args[0]
        if self.layers.results is None:
            leaves = fx.map_arg(leaves, lambda node: self.made[self._place(node)])
        elif any(each.number >= len(leaves) for each in self.layers.results):
            raise NotRepeated("the graph returns something else than the model")
        else:
            leaves = tuple(self._result(leaves[each.number], each) for each in self.layers.results)
        self._create(self.output, self.output.target, (leaves,), {}, self.output.name)

    def _result(self, leaf: Any, stamped: StampedResult) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        place = self._place(leaf)
        is_size = isinstance(leaf.meta.get("val"), torch.SymInt)  # one number in runs of few layers and of all
        if not is_size and place.stack != stamped.stack and (place.stack in self.repetitions or stamped.stack):
            raise NotRepeated(f"{leaf.name} is not computed in the layer that the model returns it from")
        return self.made[place._replace(member=stamped.member) if stamped.stack else place]

    def _place(self, node: fx.Node) -> Place:
        """Return the place of what a node returns, as seen from the end of the graph."""
        return self.places[node] if node in self.places else self.program.place(self.number[node], from_end=True)

    # Tensors.

    def _read_tensors(self) -> None:
        """Make the nodes that read tensors, in the order of torch.export: parameters, buffers, constants."""
        last: dict[fx.Node, tuple[Repetition, list[fx.Node]]] = {}
        for repetition in self.repetitions.values():
            of_last = [node for node in self.reads if repetition.in_last_period(self.places[node])]
            for kind in ("parameter", "buffer", "constant"):
                if of_kind := [node for node in of_last if self._kind(node) == kind]:
                    last[of_kind[-1]] = (repetition, of_kind)
        for node in self.reads:
            self._read_tensor(node, str(node.target), node.name, self.places[node])
            if node not in last:
                continue
            repetition, templates = last[node]
            for member in range(repetition.captured, repetition.members):
                for template in templates:
                    if self.places[template].member == repetition.template(member):
                        self._read_in_layer(template, repetition, member)

    def _kind(self, node: fx.Node) -> str:
        if str(node.target) not in self.tensors:
            return "constant"
        return "parameter" if isinstance(self.tensors[str(node.target)], nn.Parameter) else "buffer"

    def _read_in_layer(self, node: fx.Node, repetition: Repetition, member: int) -> None:
        """Make the node that reads in a layer what `node` reads in its template."""
        place = self.places[node]
        new_place = place._replace(member=member)
        before, after = f"{repetition.stack}.{place.member}.", f"{repetition.stack}.{member}."
        if self._kind(node) == "constant":
            self._read_tensor(node, str(node.target).replace(before, after, 1), "", new_place)
            return
        name = f"{after}{place.within}"
        tensor = self.tensors.get(name)
        if tensor is None or _like(tensor) != _like(self.tensors[str(node.target)]):
            raise NotRepeated(f"{name} is another kind of tensor than {node.target}")
        self.registered[name] = tensor
        before, after = before.replace(".", "_"), after.replace(".", "_")
        if not node.name.startswith(before):
            raise NotRepeated(f"the node of {node.target} is called {node.name}")
        self._read_tensor(node, name, after + node.name.removeprefix(before), new_place)

    def _read_tensor(self, node: fx.Node, target: str, name: str, place: Place) -> None:
        if CONSTANT.match(target):
            path = target.rpartition("_")[0]
            target = f"{path}_{len(self.constants)}"
            name = target.replace(".", "_")
            self.constants.append((target, tensor_of(self.gm, str(node.target)).clone()))
        self.made[place] = self._create(node, target, (), {}, name)

    # What is computed.

    def _stamp(self, repetition: Repetition, member: int) -> None:
        """Make the nodes of a layer that was left out."""
        template = repetition.template(member)
        moves = self.relations[repetition.stack][template]
        path = re.compile(re.escape(f"{repetition.stack}.{template}") + r"(?=\.|@|$)")
        for within, number in enumerate(self.program.members[repetition.stack, template]):
            new = self._copy(self.nodes[number], number, member, moves[within], member - template)
            if modules := new.meta.get("nn_module_stack"):
                new.meta["nn_module_stack"] = {
                    path.sub(f"{repetition.stack}.{member}", key): (
                        path.sub(f"{repetition.stack}.{member}", name),
                        *rest,
                    )
                    for key, (name, *rest) in modules.items()
                }

    def _copy(self, node: fx.Node, number: int, member: int, moves: Sequence[bool] = (), by: int = 0) -> fx.Node:
        """Copy a node.

        Args:
            node, number: the node and its number in the program.
            member: the layer in which the copy is.
            moves: for each value that it reads, whether that is in another place for the copy.
            by: how many layers further on.
        """
        reads = enumerate(self.program.steps[number].reads)
        stack = self.program.block_of[number][0]

        def operand(_: fx.Node) -> fx.Node:
            index, read = next(reads)
            if by and moves[index]:
                read = read._replace(member=read.member + by)
            elif read.stack != stack and read.stack in self.repetitions and node.target != GUARDS:
                read = self._from_outside(read)
            return self.made[read]

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else node.name
        new = self._create(node, node.target, args, kwargs, name)
        for from_end in (False, True):
            place = self.program.place(number, from_end=from_end)
            self.made[place._replace(member=member)] = new
        return new

    def _from_outside(self, read: Place) -> Place:
        """Return the place that is read from outside of its stack, in the graph of all layers."""
        repetition = self.repetitions[read.stack]
        member = repetition.seen_from_outside(read.member)
        if member != read.member and repetition.template(member) != read.member and not _is_end(read):
            raise NotRepeated(f"the last layers of {read.stack} are read, which are of other kinds than the captured")
        return read._replace(member=member)

    def _create(self, node: fx.Node, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        new = self.graph.create_node(node.op, target, args, kwargs, name, node.type)
        new.meta = dict(node.meta)
        return new


def _read_sizes_of_first(inputs: Sequence[fx.Node]) -> None:
    """Read each size of the first input that has it, in place, because torch.export reads one that may be left out."""
    first: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            first.setdefault(str(size), (node, dim))
    for node in inputs:
        for user in [user for user in node.users if user.target is torch.ops.aten.sym_size.int]:
            user.args = first[str(node.meta["val"].shape[user.args[1]])]


def _write_first(size: fx.Node) -> None:
    """Let sums and products of sizes name this one first: torch.export orders them by names, which no layer shares."""
    for user in list(size.users):
        if user.target in (operator.add, operator.mul) and user.args[-1] is size:
            user.args = (size, *user.args[:-1])


def _is_end(place: Place) -> bool:
    """Tell whether a place is the last step of its layer, which layers of all kinds have."""
    return isinstance(place.within, tuple) and place.within[1] == -1


def _set_constant(gm: fx.GraphModule, target: str, value: Tensor) -> None:
    """Set a tensor that is neither a parameter nor a buffer, as torch.export sets constants."""
    path, _, leaf = target.rpartition(".")
    module: nn.Module = gm
    for part in path.split(".") if path else ():
        if part not in children_of(module):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    setattr(module, leaf, value)


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.requires_grad
