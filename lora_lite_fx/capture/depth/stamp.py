"""Complete the graph of a model whose stacks of layers were shortened: stamp the layers that were left out.

The new graph is written in the order of the old one. After the last captured layer of a stack, each layer that was left
out is a copy of the nodes of its template, which read the tensors of that layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...compat.torch import codegen_of, empty_like
from ...graph.tensors import module_at, register_tensor, tensor_of
from ..export import GUARDS
from ..graph_calls import return_as
from .graph_program import CONSTANT, GraphProgram, Layers
from .program import NotRepeated, Place, PlacedStep
from .repetition import Repetition, StampedResult, further

_NUMBER = re.compile(r"_\d+$")


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
    """The graph of all layers, while it is written.

    Each new node is known by the place of its value, so that copies find what they read.
    """

    def __init__(self, gm: fx.GraphModule, model: nn.Module, layers: Layers) -> None:
        self.gm = gm
        self.layers = layers
        self.repetitions = layers.repetitions
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= model.named_buffers(remove_duplicate=False)
        self.captured = GraphProgram(gm, layers)
        self.graph = empty_like(gm.graph)
        self.made: dict[Place, fx.Node] = {}
        self.registered: dict[str, Tensor] = {}
        self.constants: list[tuple[str, Tensor]] = []

    def run(self) -> None:
        program, inputs_left_out = self.captured.program, self.layers.inputs_left_out()
        self._read_tensors()  # before the inputs, as torch.export: parameter work stands between
        self._take_inputs(inputs_left_out)
        last_sizes = self._last_templates(self.captured.sizes, lambda node: "")
        for node in self.gm.graph.nodes:
            if node in self.captured.sizes:
                self._read_size(node, self.captured.places[node].layer)
                for template, layer in self._left_out_after(node, last_sizes):
                    self._read_size(template, layer)
            if (number := self.captured.number.get(node)) is None:
                continue
            stack, layer = part = program.part_of[number]
            self._copy(node, number, program.steps[number], layer)
            repetition = self.repetitions.get(stack)
            if repetition is not None and layer == repetition.captured - 1 and number == program.numbers[part][-1]:
                for left_out in repetition.left_out:
                    self._stamp(repetition, left_out)
        self._return()
        self.graph.set_codegen(codegen_of(self.gm.graph))
        if self.layers.returned is not None:
            return_as(self.graph, self.layers.returned)
        for name, tensor in self.registered.items():
            register_tensor(self.gm, name, tensor)
        for name, tensor in self.constants:  # neither parameters nor buffers, as torch.export has them
            path, _, leaf = name.rpartition(".")
            setattr(module_at(self.gm, path), leaf, tensor)
        self.gm.graph = self.graph

    # Nodes of layers that were left out stand after the last one of their kind in a captured layer.

    def _last_templates(
        self, nodes: Sequence[fx.Node], kind: Callable[[fx.Node], str]
    ) -> dict[fx.Node, tuple[Repetition, list[fx.Node]]]:
        """Return the last node of each kind in the templates of each stack, with all nodes of that kind there."""
        last: dict[fx.Node, tuple[Repetition, list[fx.Node]]] = {}
        for repetition in self.repetitions.values():
            templates: dict[str, list[fx.Node]] = {}
            for node in nodes:
                if repetition.in_last_period(self.captured.places[node]):
                    templates.setdefault(kind(node), []).append(node)
            last |= {of_kind[-1]: (repetition, of_kind) for of_kind in templates.values()}
        return last

    def _left_out_after(
        self, node: fx.Node, last: dict[fx.Node, tuple[Repetition, list[fx.Node]]]
    ) -> Iterator[tuple[fx.Node, int]]:
        """Yield the templates of the nodes that stand after `node`, each with the layer of the copy."""
        if node in last:
            repetition, templates = last[node]
            for layer in repetition.left_out:
                for template in templates:
                    if self.captured.places[template].layer == repetition.template(layer):
                        yield template, layer

    # Tensors.

    def _read_tensors(self) -> None:
        """Make the nodes that read tensors, in the order of torch.export: parameters, buffers, constants."""
        last = self._last_templates(self.captured.tensors, self._kind)
        for node in self.captured.tensors:
            self._read_tensor(node, str(node.target), node.name, self.captured.places[node])
            for template, layer in self._left_out_after(node, last):
                self._read_in_layer(template, layer)

    def _kind(self, node: fx.Node) -> str:
        if str(node.target) not in self.tensors:
            return "constant"
        return "parameter" if isinstance(self.tensors[str(node.target)], nn.Parameter) else "buffer"

    def _read_in_layer(self, node: fx.Node, layer: int) -> None:
        """Make the node that reads in a layer what `node` reads in its template."""
        place = self.captured.places[node]
        new_place = place._replace(layer=layer)
        before, after = f"{place.stack}.{place.layer}.", f"{place.stack}.{layer}."
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

    # What goes in and out.

    def _take_inputs(self, left_out: dict[int, int]) -> None:
        """Make the inputs. The shortened model does not read those of layers that it lacks, so it knows no sizes."""
        inputs = self.captured.inputs
        of_graph = {self.gm.graph.output_node(), *self.gm.graph.find_nodes(op="call_module", target=GUARDS)}
        for number, node in enumerate(inputs):
            new = self._create(node, node.target, node.args, node.kwargs, node.name)
            self.made[self.captured.places[node]] = new
            if number in left_out:
                if not of_graph.issuperset(node.users):
                    raise NotRepeated(f"the input {node.name} is not one of a layer that was left out")
                new.meta["val"] = inputs[left_out[number]].meta["val"]

    def _read_size(self, node: fx.Node, layer: int) -> None:
        """Make the node that reads in a layer the size of an input that `node` reads in its own."""
        source = self.made[self.captured.places[node.all_input_nodes[0]]._replace(layer=layer)]
        new = self._create(node, node.target, (source, *node.args[1:]), {}, _NUMBER.sub("", node.name))
        self.made[self.captured.places[node]._replace(layer=layer)] = new

    def _return(self) -> None:
        output = self.gm.graph.output_node()
        leaves: Any = output.args[0]
        if self.layers.results is None:
            leaves = fx.map_arg(leaves, lambda node: self.made[self._place(node)])
        elif any(result.number >= len(leaves) for result in self.layers.results):
            raise NotRepeated("the graph returns something else than the model")
        else:
            leaves = tuple(self._result(leaves[result.number], result) for result in self.layers.results)
        self._create(output, output.target, (leaves,), {}, output.name)

    def _result(self, leaf: Any, result: StampedResult) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        place = self._place(leaf)
        is_size = isinstance(leaf.meta.get("val"), torch.SymInt)  # one number in runs of few layers and of all
        if not is_size and place.stack != result.stack and (place.stack in self.repetitions or result.stack):
            raise NotRepeated(f"{leaf.name} is not computed in the layer that the model returns it from")
        return self.made[place._replace(layer=result.layer) if result.stack else place]

    def _place(self, node: fx.Node) -> Place:
        """Return the place of what a node returns, as seen from the end of the graph."""
        if node in self.captured.places:
            return self.captured.places[node]
        return self.captured.program.place(self.captured.number[node], from_end=True)

    # What is computed.

    def _stamp(self, repetition: Repetition, layer: int) -> None:
        """Make the nodes of a layer that was left out."""
        template = repetition.template(layer)
        part = repetition.stack, template
        path = re.compile(re.escape(f"{repetition.stack}.{template}") + r"(?=\.|@|$)")

        def rename(name: str) -> str:
            return path.sub(f"{repetition.stack}.{layer}", name)

        steps = zip(self.captured.program.numbers[part], self.captured.templates[part], strict=True)
        for number, (step, before) in steps:
            new = self._copy(self.captured.nodes[number], number, further(step, before, layer - template), layer)
            if modules := new.meta.get("nn_module_stack"):
                new.meta["nn_module_stack"] = {
                    rename(key): (rename(name), *rest) for key, (name, *rest) in modules.items()
                }

    def _copy(self, node: fx.Node, number: int, step: PlacedStep, layer: int) -> fx.Node:
        """Copy a node, with its number in the program, into a layer; `step` says what the copy reads."""
        program = self.captured.program
        stack = program.part_of[number][0]
        reads = (
            self._from_outside(read)
            if read.stack != stack and read.stack in self.repetitions and node.target != GUARDS
            else read
            for read in step.reads
        )
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: self.made[next(reads)])
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else node.name
        new = self._create(node, node.target, args, kwargs, name)
        for from_end in (False, True):
            self.made[program.place(number, from_end=from_end)._replace(layer=layer)] = new
        return new

    def _from_outside(self, read: Place) -> Place:
        """Return the place that is read from outside of its stack, in the graph of all layers."""
        repetition = self.repetitions[read.stack]
        layer = repetition.in_full_model(read.layer)
        if layer != read.layer and repetition.template(layer) != read.layer and not _is_end(read):
            raise NotRepeated(f"the last layers of {read.stack} are read, which are of other kinds than the captured")
        return read._replace(layer=layer)

    def _create(self, node: fx.Node, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        new = self.graph.create_node(node.op, target, args, kwargs, name, node.type)
        new.meta = dict(node.meta)
        return new


def _is_end(place: Place) -> bool:
    """Tell whether a place is the last step of its layer, which layers of all kinds have."""
    return isinstance(place.within, tuple) and place.within[1] == -1


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.requires_grad
