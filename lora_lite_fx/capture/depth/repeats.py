"""Find how the layers of a model repeat, in a program: the operators of a run, or the nodes of a graph.

A program is a list of steps. Each belongs to a member of a stack (a layer of a `ModuleList`) or stands outside. Two
layers are one program if their steps are the same but for what they read, and that is at the same distance from both
or at one place for both. A repetition says from which layer on this is so, and with which period: Gemma 2 alternates
two kinds of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LONGEST_PERIOD = 12


class NotRepeated(Exception):
    """The reason why a stack of layers is captured in full."""


class Step(NamedTuple):
    """A step of a program.

    Args:
        what: all that it does but for what it reads: the operator, its literals, what its results look like.
        reads: for each value that it reads, the number of the step that made it and which of its results it is; or
            the qualified name of a tensor and 0.
        inside: the stacks and their members that it is called in, the outermost first.
        about_sizes: whether it computes or compares sizes and nothing else. These steps are counted by themselves,
            because what all layers need is computed in the first one.
    """

    what: object
    reads: tuple[tuple[int | str, int], ...]
    inside: tuple[tuple[str, int], ...] = ()
    about_sizes: bool = False


class Result(NamedTuple):
    """A leaf of what a model returns.

    Args:
        what: its value, or for a tensor what it looks like.
        read: of a tensor, where it comes from, as in `Step.reads`.
    """

    what: object
    read: tuple[int | str, int] | None


def input_name(number: int) -> str:
    """Return the name of a leaf of the arguments, by its number, as steps read it."""
    return f"{_INPUT}{number}>"


def number_of_input(name: str) -> int:
    """Return the number of the leaf of the arguments that `input_name` has given this name."""
    return int(name.removeprefix(_INPUT).removesuffix(">"))


_INPUT = "<input "


Block = tuple[str, int]
"""A stack and the number of its member; or no stack, and how many stacks have run before."""


class Place(NamedTuple):
    """The place of a value: in which block, at which step of it or under which name there, and which result."""

    stack: str
    member: int
    within: object
    result: int


@dataclass(frozen=True)
class Located:
    """A step whose reads are places."""

    what: object
    reads: tuple[Place, ...]


@dataclass(frozen=True)
class Repetition:
    """The layers of a stack that repeat: layer `i >= first` is layer `i - period` again.

    Args:
        stack: qualified name of the container.
        first: the first layer that is repeated.
        period: after how many layers.
        members: the number of layers.
        kinds: the number of different layers.
    """

    stack: str
    first: int
    period: int
    members: int
    kinds: int

    @property
    def captured(self) -> int:
        """The number of layers that show all kinds, and the repetition."""
        return self.first + 2 * self.period

    def template(self, member: int) -> int:
        """Return the captured layer that this layer repeats."""
        after = member - self.captured
        return member if after < 0 else self.captured - self.period + after % self.period

    def in_last_period(self, place: Place) -> bool:
        """Tell whether a place is in the last period of the captured layers, which are the templates of the others."""
        return place.stack == self.stack and self.captured - self.period <= place.member < self.captured

    def seen_from_outside(self, captured: int) -> int:
        """Return the layer that is read where the shortened stack has layer `captured` read, from outside of it.

        The layers of the last period are meant as the last ones, those before by their number.
        """
        from_end = self.captured - captured
        return self.members - from_end if from_end <= self.period else captured


class Blocks:
    """A program by blocks.

    Args:
        steps: in the order in which they run.
        stacks: the stacks whose members are blocks, by name, with their sizes. No one is inside another.
        inputs: names for the inputs that single members read, of a run of all members; None to find them.

    Raises:
        NotRepeated: the members of a stack do not run one after the other.
    """

    def __init__(
        self, steps: Sequence[Step], stacks: Mapping[str, int], inputs: Mapping[str, str] | None = None
    ) -> None:
        self.stacks = dict(stacks)
        self.block_of = _blocks(steps, stacks)
        self.inputs = _inputs_of_blocks(steps, self.block_of) if inputs is None else inputs
        self.members: dict[Block, list[int]] = {}
        self.within: list[tuple[bool, int]] = []
        self._counts: dict[tuple[Block, bool], int] = {}
        for number, (step, block) in enumerate(zip(steps, self.block_of, strict=True)):
            self.members.setdefault(block, []).append(number)
            key = block, step.about_sizes
            self._counts[key] = self._counts.get(key, 0) + 1
            self.within.append((step.about_sizes, self._counts[key]))

        self.steps = [
            Located(step.what, tuple(self.place_read(read, self.block_of[number]) for read in step.reads))
            for number, step in enumerate(steps)
        ]

    def place_read(self, read: tuple[int | str, int], block: Block | None = None) -> Place:
        """Return the place of what is read.

        Args:
            read: as in `Step.reads`.
            block: that reads it; None for what the model returns.
        """
        source, result = read
        if isinstance(source, str):
            return place_of_tensor(self.inputs.get(source, source), self.stacks)
        return self.place(source, result, from_end=self.block_of[source] != block)

    def place(self, number: int, result: int = 0, from_end: bool = False) -> Place:
        """Return the place of a result of a step.

        Args:
            number: of the step.
            result: of the step.
            from_end: whether to count from the end of the block, as other blocks do: a first layer may begin with
                what all layers need, and ends like the others.
        """
        block, (about_sizes, within) = self.block_of[number], self.within[number]
        if from_end:
            within -= self._counts[block, about_sizes] + 1
        return Place(*block, (about_sizes, within), result)

    def of(self, block: Block) -> list[Located]:
        """Return the steps of a block."""
        return [self.steps[number] for number in self.members.get(block, ())]


def place_of_tensor(name: str, stacks: Mapping[str, int]) -> Place:
    """Return the place of the tensor of that qualified name."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            member, _, within = name[len(stack) + 1 :].partition(".")
            if member.isdigit():
                return Place(stack, int(member), within, -1)
    return Place("", 0, name, -1)


def _blocks(steps: Sequence[Step], stacks: Mapping[str, int]) -> list[Block]:
    """Return the block of each step. What runs between two layers belongs to the second one."""
    layers = [next((layer for layer in step.inside if layer[0] in stacks), None) for step in steps]
    done: list[str] = []
    at: Block = ("", 0)
    blocks: list[Block] = []
    following = _following(layers)
    for layer, after in zip(layers, following, strict=True):
        target = layer
        if layer is None and at[0] and after is not None and after[0] == at[0]:
            target = after
        if target is None:
            if at[0]:
                done.append(at[0])
            at = ("", len(done))
        elif target != at:
            stack, member = target
            if at[0] and at[0] != stack:
                done.append(at[0])
            if stack in done or member != (at[1] + 1 if at[0] == stack else 0):
                raise NotRepeated(f"the layers of {stack} do not run once each, one after the other")
            at = target
        blocks.append(at)
    if at[0]:
        done.append(at[0])
    for stack, size in stacks.items():
        if stack not in done or (stack, size - 1) not in blocks:
            raise NotRepeated(f"not all layers of {stack} run")
    return blocks


def _inputs_of_blocks(steps: Sequence[Step], block_of: Sequence[Block]) -> dict[str, str]:
    """Return names for the inputs that one layer alone reads: as a tensor of that layer would be called."""
    readers: dict[str, dict[Block, None]] = {}
    for step, block in zip(steps, block_of, strict=True):
        for source, _ in step.reads:
            if isinstance(source, str) and source.startswith(_INPUT):
                readers.setdefault(source, {})[block] = None
    counts: dict[Block, int] = {}
    names = {}
    for name, blocks in readers.items():
        (block, *others) = blocks
        if block[0] and not others:
            counts[block] = number = counts.get(block, -1) + 1
            names[name] = f"{block[0]}.{block[1]}.{_INPUT}{number}>"
    return names


def _following(layers: Sequence[Block | None]) -> list[Block | None]:
    """Return for each step the layer of the next step that is in one."""
    after: Block | None = None
    found: list[Block | None] = []
    for layer in reversed(layers):
        after = layer or after
        found.append(after)
    return found[::-1]


def repetition_of(program: Blocks, stack: str) -> Repetition:
    """Return the repetition of a stack that needs the fewest layers to be seen.

    Raises:
        NotRepeated: there is none that leaves out a layer.
    """
    size = program.stacks[stack]
    layers = [program.of((stack, member)) for member in range(size)]
    what = [hash(tuple(step.what for step in layer)) for layer in layers]
    for captured in range(3, size):
        for period in range(1, min(_LONGEST_PERIOD, (captured - 1) // 2) + 1):
            first = captured - 2 * period
            if any(what[member] != what[member + period] for member in range(first, size - period)):
                continue
            found = Repetition(stack, first, period, size, len(set(what)))
            relations = relations_of(program, found)
            if relations is not None and all(
                _repeats(layers[member], member, layers[found.template(member)], found, relations)
                for member in range(captured, size)
            ):
                return found
    raise NotRepeated(f"the {size} layers of {stack} do not repeat")


Relations = Mapping[int, Sequence[Sequence[bool]]]
"""For each layer of the last captured period, and each value that each of its steps reads: whether its place moves
along with the layer."""


def relations_of(program: Blocks, repetition: Repetition) -> Relations | None:
    """Compare the last period of the captured layers with the one before; None if they differ."""
    relations: dict[int, list[list[bool]]] = {}
    for member in range(repetition.captured - repetition.period, repetition.captured):
        before, layer = (program.of((repetition.stack, number)) for number in (member - repetition.period, member))
        if len(before) != len(layer):
            return None
        moves: list[list[bool]] = []
        for one, two in zip(before, layer, strict=True):
            if one.what != two.what or len(one.reads) != len(two.reads):
                return None
            moves.append([read != other for read, other in zip(one.reads, two.reads, strict=True)])
            for read, other in zip(one.reads, two.reads, strict=True):
                if read != other and _moved(read, repetition, repetition.period) != other:
                    return None
        relations[member] = moves
    return relations


def _moved(place: Place, repetition: Repetition, by: int) -> Place | None:
    """Return the place as many layers further on; None if it is not in the stack."""
    return place._replace(member=place.member + by) if place.stack == repetition.stack else None


def _repeats(
    layer: Sequence[Located],
    member: int,
    template: Sequence[Located],
    repetition: Repetition,
    relations: Relations,
) -> bool:
    """Check whether a layer is its template again."""
    number = repetition.template(member)
    expected = stamped(template, repetition, relations[number], member - number)
    return len(layer) == len(template) and all(one == two for one, two in zip(layer, expected, strict=True))


def stamped(
    template: Sequence[Located], repetition: Repetition, moves: Sequence[Sequence[bool]], by: int
) -> Iterator[Located]:
    """Yield the steps of a layer that is as many layers behind its template."""
    for step, of_step in zip(template, moves, strict=True):
        places = (
            read._replace(member=read.member + by) if move else read
            for read, move in zip(step.reads, of_step, strict=True)
        )
        yield Located(step.what, tuple(places))


def require_stamped(full: Blocks, short: Blocks, repetitions: Sequence[Repetition]) -> None:
    """Check that a program of all layers is that of the captured layers, with the rest stamped.

    Args:
        full: its repetitions are known.
        short: of the model with shortened stacks.
        repetitions: of all stacks.

    Raises:
        NotRepeated: it is not.
    """
    by_stack = {repetition.stack: repetition for repetition in repetitions}

    def from_outside(place: Place) -> Place:
        repetition = by_stack.get(place.stack)
        if repetition is None:
            return place
        return place._replace(member=repetition.seen_from_outside(place.member))

    for block in short.members:
        own = block[0]
        expected = [
            Located(step.what, tuple(read if own and read.stack == own else from_outside(read) for read in step.reads))
            for step in short.of(block)
        ]
        found = full.of(block)
        if found != expected:
            where = f"layer {block[1]} of {own}" if own else "what runs outside of layers"
            raise NotRepeated(f"{where} changes when layers are left out")
    left_out = {
        (repetition.stack, member)
        for repetition in repetitions
        for member in range(repetition.captured, repetition.members)
    }
    if full.members.keys() != short.members.keys() | left_out:
        raise NotRepeated("what runs outside of layers changes when layers are left out")
