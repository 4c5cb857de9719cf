"""Capture a deep model at the cost of a few layers: cut its stacks of layers, capture, stamp the rest.

What proves the copies is a run of the whole model on tensors without data (`operators.py`). Its operators must be those
of the shortened model with the other layers stamped, one by one (`repetition.py`). So a layer that branches on its own
number, or has another constant, is seen although it was not captured. The graph of the captured layers must repeat in
the same way (`graph_program.py`); then its last layers are copied (`stamp.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from torch import Tensor, fx, nn

from ...compat.torch import pytree
from ...errors import CaptureError
from ...graph.modes import put_in_mode
from ...graph.regions import has_branches
from ..export import guard_sizes
from ..quirks.quirk import Call
from .dropouts import Dropout, has_contiguous_calls, with_other_dropouts
from .graph_program import Layers
from .known_operators import KnownOperators
from .operators import Run, StandIn
from .other_sizes import Sizes, guessed_sizes, sizes_taken
from .program import NotRepeated, Program
from .repetition import Repetition, captured_layers, repetition_of, require_same_when_shortened, stamped_results
from .stacks import shortened, stacks_of
from .stamp import number_nodes, stamp


class ByDepth:
    """Captures a model, with few of its layers if it has stacks of them, in one mode and then in the other.

    Args:
        model: is shortened while it is captured, and is as before afterwards.
        call: its arguments.
        export: captures `model` as it is. Gets the tensors of the call that the model does not read.
    """

    def __init__(self, model: nn.Module, call: Call, export: Callable[[Sequence[Tensor]], fx.GraphModule]) -> None:
        self._model, self._call = model, call
        self._leaves = pytree.tree_leaves(call)
        self._export = export
        self._stacks = stacks_of(model)
        self._drops = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
        self._shown: list[tuple[Sizes, Run]] = []
        self._known = KnownOperators()
        self.few_layers: dict[str, int] = {}
        """How many layers of each stack were captured, in the last mode; empty if all were."""

    def capture(self) -> tuple[fx.GraphModule, list[str]]:
        """Return the graph of the model in its mode, and what was done with its layers, for the log."""
        self._shown, self.few_layers = [], {}
        if not self._stacks:
            return self._in_full(), []
        try:
            gm, repetitions = self._in_part()
        except NotRepeated as reason:
            return self._in_full(), [f"all layers captured, because {reason}"]
        except Exception as error:  # whatever keeps a part of a model from running is no matter of the whole
            why = "a part could not be captured" if isinstance(error, CaptureError) else f"of a {type(error).__name__}"
            return self._in_full(), [f"all layers captured, because {why}"]
        self.few_layers = captured_layers(repetitions)
        return gm, [_said(repetition) for repetition in repetitions.values()]

    def in_other_mode(self, gm: fx.GraphModule) -> fx.GraphModule | None:
        """Return the graph of the model in evaluation, after it was captured in training.

        Args:
            gm: what was captured.

        Returns:
            `gm` itself, if evaluation has the same operators with the same numbers, the same functions and comparisons
            of sizes; a graph like it, if only dropouts differ; None if the model must be captured again.
        """
        if not self._shown:
            return None
        try:
            stand_in = self._new_stand_in()
            if not self._drops and all(stand_in.run(self._call, sizes) == run for sizes, run in self._shown):
                return gm
            return self._with_other_dropouts(gm, stand_in)
        except Exception:  # it does not run without data in this mode
            return None

    def _with_other_dropouts(self, gm: fx.GraphModule, stand_in: StandIn) -> fx.GraphModule | None:
        for sizes, captured in self._shown:
            dropouts: dict[bool, list[Dropout]] = {True: [], False: []}
            runs = {}
            for mode, record in dropouts.items():
                put_in_mode(stand_in.model, mode)
                runs[mode] = stand_in.run(self._call, sizes, record)
            if runs[True] != runs[False] or not has_contiguous_calls(gm, captured.steps, runs[False].steps):
                return None
        return with_other_dropouts(gm, dropouts[True], dropouts[False])

    def _in_full(self) -> fx.GraphModule:
        gm = self._export(())
        number_nodes(gm)
        if not has_branches(gm):
            with suppress(Exception):  # the model does not run without data, or not at sizes that were found
                sizes = sizes_taken(gm, self._leaves, guessed_sizes(self._leaves), {})
                self._shown = [(sizes, self._new_stand_in().run(self._call, sizes))]
        return gm

    def _new_stand_in(self) -> StandIn:
        """Return a stand-in, which knows the operators of the ones before, and counts its symbols from zero."""
        return StandIn(self._model, self._stacks, self._known)

    def _in_part(self) -> tuple[fx.GraphModule, Mapping[str, Repetition]]:
        stand_in = self._new_stand_in()
        # Sizes of the example could be equal to a number of the model, so check others that the graph takes.
        sizes = guessed_sizes(self._leaves)
        try:
            layers, whole = self._layers(stand_in, sizes)
        except Exception:  # the model may refuse them
            sizes = {}
            layers, whole = self._layers(stand_in, sizes)
        left_out = layers.inputs_left_out()
        unread = {number: self._leaves[number] for number in left_out}
        with shortened(self._model, captured_layers(layers.repetitions)):
            gm = self._export([*unread.values()])
        guard_sizes(gm, left_out, (), unread)
        taken = sizes_taken(gm, self._leaves, sizes, left_out)
        shown = [(sizes, whole)]
        if taken != sizes:
            others, whole = self._layers(stand_in, taken)
            if others != layers:
                raise NotRepeated("layers repeat otherwise at other sizes")
            shown.append((taken, whole))
        stamp(gm, self._model, layers)
        self._shown = shown
        return gm, layers.repetitions

    def _layers(self, stand_in: StandIn, sizes: Sizes) -> tuple[Layers, Run]:
        """Return how stacks repeat, proved by a run of the whole and one of the shortened model; and the former run.

        Raises:
            NotRepeated: none does.
        """
        whole = stand_in.run(self._call, sizes)
        repetitions: dict[str, Repetition] = {}
        reason = NotRepeated("no stack of layers runs")
        for name, size in self._stacks.items():
            if any(name.startswith(f"{outer}.") for outer in repetitions):
                continue
            try:
                repetitions[name] = repetition_of(Program(whole.steps, {name: size}), name)
            except NotRepeated as other:
                reason = other
        if not repetitions:
            raise reason
        captured = captured_layers(repetitions)
        with shortened(stand_in.model, captured):
            part = stand_in.run(self._call, sizes)
        full = Program(whole.steps, {stack: repetition.layers for stack, repetition in repetitions.items()})
        short = Program(part.steps, captured, full.inputs)
        require_same_when_shortened(full, short, repetitions)
        results = stamped_results(full, short, (whole.results, part.results), repetitions)
        for stack, repetition in repetitions.items():
            _require_same_modules(self._model.get_submodule(stack), repetition)
        return Layers(repetitions, full.inputs, results, whole.returned), whole


def _require_same_modules(stack: nn.Module, repetition: Repetition) -> None:
    """Check that layers are built of modules of the same classes as their templates, which a graph tells."""
    layers = [[(name, type(module)) for name, module in layer.named_modules()] for layer in stack.children()]
    for number, layer in enumerate(layers):
        if layer != layers[repetition.template(number)]:
            raise NotRepeated(f"layer {number} of {repetition.stack} has modules of other classes")


def _said(repetition: Repetition) -> str:
    kinds = f"{repetition.kinds} kind{'s' if repetition.kinds > 1 else ''}"
    stamped = repetition.layers - repetition.captured
    return (
        f"{repetition.layers} layers of {repetition.stack}: {kinds}, captured {repetition.captured}, stamped {stamped}"
    )
