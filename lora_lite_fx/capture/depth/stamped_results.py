"""Find where the results of a model come from, of which some belong to single layers: caches, and all hidden states.

A model with fewer layers computes fewer of these. Those of a layer that was left out are those of its template, as many
layers further on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .repeats import Blocks, NotRepeated, Place, Repetition, Result


class StampedResult(NamedTuple):
    """A result of the model with all layers, as it follows from one of the model with the captured layers.

    Args:
        number: of that result.
        stack, member: the layer of which it is the result in place of the captured one; no stack for another value.
    """

    number: int
    stack: str = ""
    member: int = 0


def stamped_results(
    full: Blocks,
    short: Blocks,
    results: tuple[Sequence[Result], Sequence[Result]],
    repetitions: Sequence[Repetition],
) -> tuple[StampedResult, ...]:
    """Return where each result of the model comes from in the graph of the captured layers.

    Args:
        full, short: the programs of all layers and of the captured ones.
        results: of the two.
        repetitions: of all stacks.

    Raises:
        NotRepeated: a result does not follow from those of the captured layers.
    """
    by_stack = {repetition.stack: repetition for repetition in repetitions}
    captured = [(result.what, _place(short, result)) for result in results[1]]
    by_place = {(what, place): number for number, (what, place) in reversed([*enumerate(captured)])}

    def found(number: int, what: object, place: Place | None) -> StampedResult | None:
        if place is None:
            return StampedResult(number) if captured[number : number + 1] == [(what, None)] else None
        repetition = by_stack.get(place.stack)
        template = place if repetition is None else place._replace(member=repetition.template(place.member))
        other = by_place.get((what, template))
        if other is None:
            return None
        return StampedResult(other) if repetition is None else StampedResult(other, place.stack, place.member)

    stamped: list[StampedResult] = []
    for number, result in enumerate(results[0]):
        one = found(number, result.what, _place(full, result))
        if one is None:
            raise NotRepeated("what the model returns changes otherwise when layers are left out")
        stamped.append(one)
    return tuple(stamped)


def _place(program: Blocks, result: Result) -> Place | None:
    return None if result.read is None else program.place_read(result.read)
