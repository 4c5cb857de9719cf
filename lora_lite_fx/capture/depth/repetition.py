"""Find how the layers of a stack repeat, and check that the few layers of a shortened model show all of them.

Two layers are one program if their steps are the same but for what they read, and that is either at one place for both
or as many layers further on as the layer itself. A repetition says from which layer on this is so, and with which
period: Gemma 2 alternates two kinds of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .program import NotRepeated, Part, Place, PlacedStep, Program, Result

_LONGEST_PERIOD = 12


@dataclass(frozen=True)
class Repetition:
    """The layers of a stack that repeat: layer `i >= first` is layer `i - period` again.

    Args:
        stack: qualified name of the container.
        first: the first layer that is repeated.
        period: after how many layers.
        layers: the number of layers.
        kinds: the number of different layers.
    """

    stack: str
    first: int
    period: int
    layers: int
    kinds: int

    @property
    def captured(self) -> int:
        """The number of layers that show all kinds, and the repetition."""
        return self.first + 2 * self.period

    @property
    def left_out(self) -> range:
        """The layers that are not captured."""
        return range(self.captured, self.layers)

    def template(self, layer: int) -> int:
        """Return the captured layer that this layer repeats."""
        after = layer - self.captured
        return layer if after < 0 else self.captured - self.period + after % self.period

    def in_last_period(self, place: Place) -> bool:
        """Tell whether a place is in the last period of the captured layers, which are the templates of the others."""
        return place.stack == self.stack and self.captured - self.period <= place.layer < self.captured

    def in_full_model(self, captured: int) -> int:
        """Map a captured layer's number to the full model's, for a reader outside of the stack.

        Layers of the last period are counted from the end; earlier ones keep their number.
        """
        from_end = self.captured - captured
        return self.layers - from_end if from_end <= self.period else captured


def further(step: PlacedStep, before: PlacedStep, by: int) -> PlacedStep:
    """Return a step as it is in the layer that is `by` layers further on.

    Args:
        step: of a template.
        before: the same step one period before. What both read at one place, all layers read there.
        by: a number of layers.
    """
    reads = (
        read if read == earlier else read._replace(layer=read.layer + by)
        for read, earlier in zip(step.reads, before.reads, strict=True)
    )
    return PlacedStep(step.what, tuple(reads))


def last_periods(program: Program, repetition: Repetition) -> dict[int, list[tuple[PlacedStep, PlacedStep]]] | None:
    """Return the steps of each template, each with that of one period before; None if the two periods differ."""
    templates = {}
    for layer in range(repetition.captured - repetition.period, repetition.captured):
        steps, before = (program.of((repetition.stack, number)) for number in (layer, layer - repetition.period))
        if len(steps) != len(before):
            return None
        templates[layer] = pairs = list(zip(steps, before, strict=True))
        if not all(_is_repeated(step, earlier, repetition) for step, earlier in pairs):
            return None
    return templates


def _is_repeated(step: PlacedStep, before: PlacedStep, repetition: Repetition) -> bool:
    return (step.what, len(step.reads)) == (before.what, len(before.reads)) and all(
        read == earlier
        or (earlier.stack == repetition.stack and read == earlier._replace(layer=earlier.layer + repetition.period))
        for read, earlier in zip(step.reads, before.reads, strict=True)
    )


def repetition_of(program: Program, stack: str) -> Repetition:
    """Return the repetition of a stack that needs the fewest layers to be seen.

    Raises:
        NotRepeated: there is none that leaves out a layer.
    """
    size = program.stacks[stack]
    layers = [program.of((stack, layer)) for layer in range(size)]
    what = [hash(tuple(step.what for step in layer)) for layer in layers]
    for captured in range(3, size):
        for period in range(1, min(_LONGEST_PERIOD, (captured - 1) // 2) + 1):
            first = captured - 2 * period
            if any(what[layer] != what[layer + period] for layer in range(first, size - period)):
                continue
            repetition = Repetition(stack, first, period, size, len(set(what)))
            if (templates := last_periods(program, repetition)) is None:
                continue
            number = repetition.template
            if all(
                layers[layer]
                == [further(step, before, layer - number(layer)) for step, before in templates[number(layer)]]
                for layer in repetition.left_out
            ):
                return repetition
    raise NotRepeated(f"the {size} layers of {stack} do not repeat")


def captured_layers(repetitions: Mapping[str, Repetition]) -> dict[str, int]:
    """Return how many layers of each stack are captured, by the name of the stack."""
    return {stack: repetition.captured for stack, repetition in repetitions.items()}


def require_same_when_shortened(full: Program, short: Program, repetitions: Mapping[str, Repetition]) -> None:
    """Check that the program of all layers is that of the captured layers, with the others stamped.

    Args:
        full: its layers are known to repeat.
        short: of the model with shortened stacks.
        repetitions: of all stacks, by their names.

    Raises:
        NotRepeated: it is not.
    """

    def in_full_model(read: Place, reader: Part) -> Place:
        repetition = repetitions.get(read.stack)
        if repetition is None or read.stack == reader[0]:
            return read
        return read._replace(layer=repetition.in_full_model(read.layer))

    for part in short.numbers:
        expected = [
            PlacedStep(step.what, tuple(in_full_model(read, part) for read in step.reads)) for step in short.of(part)
        ]
        if full.of(part) != expected:
            where = f"layer {part[1]} of {part[0]}" if part[0] else "what runs outside of layers"
            raise NotRepeated(f"{where} changes when layers are left out")
    left_out = {(stack, layer) for stack, repetition in repetitions.items() for layer in repetition.left_out}
    if full.numbers.keys() != short.numbers.keys() | left_out:
        raise NotRepeated("what runs outside of layers changes when layers are left out")


class StampedResult(NamedTuple):
    """A result of the full model, as it follows from one of the shortened model.

    Some results belong to single layers: caches, and all hidden states. A model with fewer layers has fewer of these.

    Args:
        number: of the result of the shortened model.
        stack, layer: the layer of which it is the result in place of the captured one; no stack for another value.
    """

    number: int
    stack: str = ""
    layer: int = 0


def stamped_results(
    full: Program,
    short: Program,
    results: tuple[Sequence[Result], Sequence[Result]],
    repetitions: Mapping[str, Repetition],
) -> tuple[StampedResult, ...]:
    """Return where each result of the full model comes from in the graph of the captured layers.

    Args:
        full, short: the programs of all layers and of the captured ones.
        results: of the two.
        repetitions: of all stacks, by their names.

    Raises:
        NotRepeated: a result does not follow from those of the captured layers.
    """
    captured = [(result.what, _place(short, result)) for result in results[1]]
    numbers = {result: number for number, result in reversed([*enumerate(captured)])}
    stamped: list[StampedResult] = []
    for number, result in enumerate(results[0]):
        place = _place(full, result)
        repetition = repetitions.get(place.stack) if place is not None else None
        if place is None:
            source = number if captured[number : number + 1] == [(result.what, None)] else None
        elif repetition is None:
            source = numbers.get((result.what, place))
        else:
            source = numbers.get((result.what, place._replace(layer=repetition.template(place.layer))))
        if source is None:
            raise NotRepeated("what the model returns changes otherwise when layers are left out")
        in_layer = (place.stack, place.layer) if place is not None and repetition is not None else ()
        stamped.append(StampedResult(source, *in_layer))
    return tuple(stamped)


def _place(program: Program, result: Result) -> Place | None:
    return None if result.read is None else program.place_read(result.read)
