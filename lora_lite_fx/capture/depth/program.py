"""A program: the operators of a run, or the nodes of a graph, as steps that belong to layers.

A step names what it reads by a place: in which layer, and where in it. So the programs of two layers can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Read = tuple[int | str, int]
"""Where a value comes from: the number of a step and of one of its results; or the name of a tensor or input, and 0."""

Part = tuple[str, int]
"""A stack and the number of its layer; or no stack, and how many stacks have run before."""

_INPUT = "<input "


class NotRepeated(Exception):
    """The reason why a stack of layers is captured in full."""


class Step(NamedTuple):
    """A step of a program.

    Args:
        what: all that it does but for what it reads: the operator, its literals, what its results look like.
        reads: the values that it reads.
        layers: the layers that it is called in, the outermost first.
        about_sizes: whether it computes or compares sizes and nothing else. These steps are counted by themselves,
            because the first layer alone computes the sizes that all layers need.
    """

    what: object
    reads: tuple[tuple[int | str, int], ...]  # `Read`, spelled out because pdoc finds no alias in a NamedTuple
    layers: tuple[tuple[str, int], ...] = ()
    about_sizes: bool = False


class Result(NamedTuple):
    """A leaf of what a model returns: its value, or for a tensor what it looks like; and where a tensor comes from."""

    what: object
    read: tuple[int | str, int] | None


class Place(NamedTuple):
    """Where a value is: in which part, at which step of it or under which name there, and which result of the step."""

    stack: str
    layer: int
    within: object
    result: int


@dataclass(frozen=True, slots=True)
class PlacedStep:
    """A step whose reads are places."""

    what: object
    reads: tuple[Place, ...]


def input_name(number: int) -> str:
    """Return the name by which steps read an input, by its number among the leaves of the arguments."""
    return f"{_INPUT}{number}>"


def number_of_input(name: str) -> int:
    """Return the number of the input that `input_name` has given this name."""
    return int(name.removeprefix(_INPUT).removesuffix(">"))


def place_of_tensor(name: str, stacks: Mapping[str, int]) -> Place:
    """Return the place of the tensor of that qualified name."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            layer, _, within = name[len(stack) + 1 :].partition(".")
            if layer.isdigit():
                return Place(stack, int(layer), within, -1)
    return Place("", 0, name, -1)


class Program:
    """Steps by parts, with places for what they read.

    Args:
        steps: in the order in which they run.
        stacks: the stacks whose layers are parts, by name, with their sizes. No stack is inside another.
        inputs: names for the inputs that single layers read, from a program of all layers; None to find them.

    Raises:
        NotRepeated: the layers of a stack do not run one after the other.
    """

    def __init__(
        self, steps: Sequence[Step], stacks: Mapping[str, int], inputs: Mapping[str, str] | None = None
    ) -> None:
        self.stacks = dict(stacks)
        self.part_of = _parts(steps, stacks)
        self.inputs = _inputs_of_layers(steps, self.part_of) if inputs is None else inputs
        self.numbers: dict[Part, list[int]] = {}
        """The numbers of the steps of each part."""
        self._within: list[tuple[bool, int]] = []
        self._counts: dict[tuple[Part, bool], int] = {}
        for number, (step, part) in enumerate(zip(steps, self.part_of, strict=True)):
            self.numbers.setdefault(part, []).append(number)
            key = part, step.about_sizes
            self._counts[key] = self._counts.get(key, 0) + 1
            self._within.append((step.about_sizes, self._counts[key]))
        self.steps = [
            PlacedStep(step.what, tuple(self.place_read(read, part) for read in step.reads))
            for step, part in zip(steps, self.part_of, strict=True)
        ]

    def place_read(self, read: Read, part: Part | None = None) -> Place:
        """Return the place of what `part` reads; None for what the model returns."""
        source, result = read
        if isinstance(source, str):
            return place_of_tensor(self.inputs.get(source, source), self.stacks)
        return self.place(source, result, from_end=self.part_of[source] != part)

    def place(self, number: int, result: int = 0, from_end: bool = False) -> Place:
        """Return the place of a result of a step.

        Args:
            number: of the step.
            result: of the step.
            from_end: whether to count from the end of the part, as other parts do. A first layer may begin with what
                all layers need, and ends like the others.
        """
        part, (about_sizes, within) = self.part_of[number], self._within[number]
        if from_end:
            within -= self._counts[part, about_sizes] + 1
        return Place(*part, (about_sizes, within), result)

    def of(self, part: Part) -> list[PlacedStep]:
        """Return the steps of a part."""
        return [self.steps[number] for number in self.numbers.get(part, ())]


def _parts(steps: Sequence[Step], stacks: Mapping[str, int]) -> list[Part]:
    """Return the part of each step. What runs between two layers belongs to the second one."""
    layers = [next((layer for layer in step.layers if layer[0] in stacks), None) for step in steps]
    next_layers = [*layers]
    for number in range(len(layers) - 2, -1, -1):
        next_layers[number] = layers[number] or next_layers[number + 1]
    done: list[str] = []
    part: Part = ("", 0)
    parts: list[Part] = []
    for called_in, after in zip(layers, next_layers, strict=True):
        is_between = called_in is None and part[0] and after is not None and after[0] == part[0]
        layer = after if is_between else called_in
        if part[0] and (layer is None or layer[0] != part[0]):
            done.append(part[0])
        if layer is None:
            part = ("", len(done))
        elif layer != part:
            stack, number = layer
            if stack in done or number != (part[1] + 1 if part[0] == stack else 0):
                raise NotRepeated(f"the layers of {stack} do not run once each, one after the other")
            part = layer
        parts.append(part)
    for stack, size in stacks.items():
        if (stack, size - 1) not in parts:
            raise NotRepeated(f"not all layers of {stack} run")
    return parts


def _inputs_of_layers(steps: Sequence[Step], part_of: Sequence[Part]) -> dict[str, str]:
    """Return names for the inputs that one layer alone reads: as a tensor of that layer would be called."""
    readers: dict[str, dict[Part, None]] = {}
    for step, part in zip(steps, part_of, strict=True):
        for source, _ in step.reads:
            if isinstance(source, str) and source.startswith(_INPUT):
                readers.setdefault(source, {})[part] = None
    counts: dict[Part, int] = {}
    names = {}
    for name, (part, *others) in readers.items():
        if part[0] and not others:
            counts[part] = number = counts.get(part, -1) + 1
            names[name] = f"{part[0]}.{part[1]}.{input_name(number)}"
    return names
