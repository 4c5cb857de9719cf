"""Complete the graph of a model whose stacks of layers were shortened: stamp the layers that were left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.tensors import register_tensor
from .operators import value_key
from .repeats import Block, Blocks, NotRepeated, Place, Relations, Repetition, Step, place_of_tensor, relations_of

_NUMBER = re.compile(r"_\d+$")
_CONSTANT = re.compile(r"(.*\.)?lifted_tensor_\d+$")
"""How torch.export calls the constants that it finds. It numbers them."""


def stamp(gm: fx.GraphModule, model: nn.Module, repetitions: Sequence[Repetition]) -> None:
    """Let `gm` compute all layers of `model`, in place.

    Args:
        gm: the graph of the model with shortened stacks.
        model: has all layers; the graph gets their tensors.
        repetitions: of all shortened stacks.

    Raises:
        NotRepeated: a captured layer is not the one before it again. `gm` is unchanged.
    """
    _Stamping(gm, model, repetitions).run()


def number_nodes(gm: fx.GraphModule) -> None:
    """Name each node by its operator and by how many nodes of that operator stand before it, in place.

    `torch.export` counts nodes too that it removes, of which there are more in a deeper model.
    """
    _Stamping(gm, gm, ()).run()


class _Stamping:
    """The graph of all layers, while it is made."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module, repetitions: Sequence[Repetition]) -> None:
        self.gm = gm
        self.repetitions = {repetition.stack: repetition for repetition in repetitions}
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= model.named_buffers(remove_duplicate=False)
        self.reads = gm.graph.find_nodes(op="get_attr", sort=True)
        self.nodes = [node for node in gm.graph.nodes if node.op != "get_attr"]
        stacks = {name: repetition.captured for name, repetition in self.repetitions.items()}
        names = _names_of_tensors(gm, self.reads, stacks)
        self.places = {node: place_of_tensor(name, stacks) for node, name in names.items()}
        self.program = Blocks(_steps(self.nodes, names, stacks), stacks)
        self.relations: dict[str, Relations] = {}
        for name, repetition in self.repetitions.items():
            relations = relations_of(self.program, repetition)
            if relations is None:
                raise NotRepeated(f"the graphs of the captured layers of {name} differ")
            self.relations[name] = relations
        self.graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
        self.made: dict[Place, fx.Node] = {}
        self.registered: dict[str, Tensor] = {}
        self.constants: list[tuple[str, Tensor]] = []

    def run(self) -> None:
        self._read_tensors()
        for number, node in enumerate(self.nodes):
            block = self.program.block_of[number]
            self._copy(node, number, block[1])
            repetition = self.repetitions.get(block[0])
            if repetition is None or block[1] != repetition.captured - 1:
                continue
            if number == self.program.members[block][-1]:
                for member in range(repetition.captured, repetition.members):
                    self._stamp(repetition, member)
        self.graph.set_codegen(self.gm.graph._codegen)
        for name, tensor in self.registered.items():
            register_tensor(self.gm, name, tensor)
        for name, tensor in self.constants:
            _set_constant(self.gm, name, tensor)
        self.gm.graph = self.graph

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
        if _CONSTANT.match(target):
            path = target.rpartition("_")[0]
            target = f"{path}_{len(self.constants)}"
            name = target.replace(".", "_")
            self.constants.append((target, _value(self.gm, str(node.target)).clone()))
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
            elif read.stack != stack and read.stack in self.repetitions:
                read = read._replace(member=self.repetitions[read.stack].seen_from_outside(read.member))
            return self.made[read]

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else node.name
        new = self._create(node, node.target, args, kwargs, name)
        for from_end in (False, True):
            place = self.program.place(number, from_end=from_end)
            self.made[place._replace(member=member)] = new
        return new

    def _create(self, node: fx.Node, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        new = self.graph.create_node(node.op, target, args, kwargs, name, node.type)
        new.meta = dict(node.meta)
        return new


def _value(gm: fx.GraphModule, target: str) -> Any:
    path, _, leaf = target.rpartition(".")
    return getattr(gm.get_submodule(path), leaf)


def _set_constant(gm: fx.GraphModule, target: str, value: Tensor) -> None:
    """Set a tensor that is neither a parameter nor a buffer, as torch.export sets constants."""
    path, _, leaf = target.rpartition(".")
    module: nn.Module = gm
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    setattr(module, leaf, value)


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.requires_grad


def _names_of_tensors(gm: fx.GraphModule, reads: Sequence[fx.Node], stacks: Mapping[str, int]) -> dict[fx.Node, str]:
    """Return the name of what each of these nodes reads.

    A constant of a layer is named by the layer, its number among the constants of the layer and its value, because
    torch.export numbers the constants of all layers.
    """
    names: dict[fx.Node, str] = {}
    counts: dict[Block, int] = {}
    for node in reads:
        target = names[node] = str(node.target)
        layers = {layer for user in node.users for layer in _layers(user, stacks)[0]}
        if not _CONSTANT.match(target) or len(layers) != 1 or not stacks:
            continue
        (layer,) = layers
        counts[layer] = counts.get(layer, -1) + 1
        names[node] = f"{layer[0]}.{layer[1]}.constant {counts[layer]} {value_key(_value(gm, target))}"
    return names


def _steps(nodes: Sequence[fx.Node], tensors: Mapping[fx.Node, str], stacks: Mapping[str, int]) -> list[Step]:
    """Return nodes as the steps of a program.

    Args:
        tensors: the nodes that read tensors, and how these are called.
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
        what = (str(node.target), repr(arguments), modules, _described(node.meta.get("val"))) if stacks else ()
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


def _described(value: Any) -> Any:
    """Return what is known of the value of a node, for comparisons."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    return str(value)
