"""Compare a graph with its model on the same inputs, and find the first module whose output differs.

A model may compute something else when it is traced than when it runs: it may ask whether it is traced, or look at the
values of its inputs, of which a graph follows one case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ..errors import COMPILE_INSTEAD, CaptureError
from ..graph.modes import modes_of, parts_with_flags
from ..log import phase
from .asserted_decisions import is_other_decision
from .comparable import revealed, varied
from .differences import Difference, distance, largest, tolerance_for
from .outputs import (
    Call,
    Mode,
    Outputs,
    has_data,
    outputs_of_graph,
    outputs_of_model,
    outputs_of_program,
    written_parameters,
)
from .process_state.held_answers import hold_answers
from .process_state.python_state import warn_of_count
from .process_state.questions import Questions
from .refusal import in_one_line, line_of_error

# Rounding may do several times as much as a change of the last bit of each module's output does.
_MORE_THAN_A_BIT = 4.0
_NOTHING = object()
_OF_PARTS = "the modes of its parts"


def own_error(model: nn.Module, call: Call) -> CaptureError | None:
    """Return an error that says that the model itself raises for a call, with its message; None if it does not.

    Args:
        model: is not changed. What it raises in one mode alone is no matter.
        call: of the user.
    """
    if not has_data(model, call):
        return None
    for training in (False, True):
        try:
            outputs_of_model(model, call, training, in_any_order=False)
        except Exception as error:
            raised = error
        else:
            return None
    return _raises_itself(model, raised)


def _raises_itself(model: nn.Module, error: BaseException) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} itself raises for the example inputs{line_of_error(error)}: {in_one_line(error)}"
        "\nThe way out: pass example_inputs that the model takes."
    )


def require_equal(
    gm: fx.GraphModule,
    model: nn.Module,
    calls: Sequence[Call],
    hint: str = "",
    made: bool = False,
    same_in_both_modes: bool = False,
) -> None:
    """Raise `CaptureError` if the flat graph `gm` and `model` differ in either mode; log what was compared.

    Args:
        gm, model: neither is changed. Where parts of the model are in other modes, the two are compared in these too.
        calls: the first is compared in all modes, also with other numbers in the place of zeros or ones; the others in
            evaluation.
        hint: a sentence on how to avoid a difference, after a space.
        made: whether the inputs are not the user's: those that the model does not take say nothing of the user's then,
            and the graph is not compared.
        same_in_both_modes: whether the model has called the same operators in both modes. Then its graph has no modes,
            and each is compared on one call: evaluation on the second, if there is one.

    Raises:
        CaptureError: they differ; or the model itself raises in both modes, for inputs of the user.
    """
    if not has_data(model, calls[0]):
        return
    first = shown = calls[0]
    compared = f"the graph of {type(model).__name__} with the model"
    with phase(f"compared {compared}", f"comparing {compared}") as details:
        comparison = _Comparison(gm, model, first, hint, details)
        comparison.ran = {} if same_in_both_modes else None
        evaluation, *others = _modes(model)
        only_training = same_in_both_modes and len(calls) > 1
        for call in calls[1:] if only_training else calls:
            comparison.compare(call, *evaluation)
        for mode in others:
            comparison.compare(first, *mode)
        if only_training and comparison.raised:
            comparison.compare(first, *evaluation)
        if len(comparison.raised) == 1 + len(others) and not made:
            cause = comparison.raised[0].__cause__
            raise _raises_itself(model, cause or comparison.raised[0]) from cause
        if (with_others := None if made else varied(first)) is not None:
            for mode in (evaluation, *others):
                ran = comparison.compare(with_others, f"{mode[0]} with other numbers in them", mode[1], of_ours=True)
                shown = with_others if ran and mode is evaluation else shown
        hold_answers(gm, model, shown, comparison.questions)
    if comparison.questions.counted is not None:
        warn_of_count(model, comparison.questions.counted)


class _Comparison:
    """A comparison of a graph with its model, on one call after the other.

    Args:
        gm, model: neither is changed.
        first: the call of which it counts where the model raises.
        hint: as of `require_equal`.
        details: gets what the log says of each comparison.
    """

    def __init__(self, gm: fx.GraphModule, model: nn.Module, first: Call, hint: str, details: list[str]) -> None:
        self.gm, self.model, self.first, self.hint, self.details = gm, model, first, hint, details
        self.questions = Questions()
        self.raised: list[_ModelRaises] = []
        self.ran: dict[int, Outputs] | None = None  # what a graph without modes has computed, by the id of the call

    def compare(self, call: Call, mode: str, where: Mode, of_ours: bool = False) -> bool:
        """Compare on a call in a mode, and return whether both have run; raise `CaptureError` as `require_equal`.

        Args:
            call, mode, where: the inputs, the mode as messages name it, and the mode of each part.
            of_ours: whether some numbers of the inputs are not the user's. It is no matter then if the graph raises.
        """
        try:
            rows = _all_rows(self.gm, self.model, call, mode, where, self.questions, self.ran)
        except CaptureError:
            raise
        except _ModelRaises as reason:
            self.details.append(f"not in {mode}, where the model raises {reason}")
            if call is self.first:
                self.raised.append(reason)
            return False
        except Exception as error:
            if of_ours or (is_other_decision(error) and call is not self.first):
                self.details.append(f"not in {mode} for another call, where the model decides otherwise")
                return False
            raise CaptureError(
                f"The graph of {type(self.model).__name__} raises on the example inputs in {mode}, where the model does"
                f" not: {in_one_line(error)}\nThe way out: {COMPILE_INSTEAD}."
            ) from error
        if wrong := [row for row in rows if row.is_result and not row.ok]:
            raise self._error(wrong[0], next(row for row in rows if not row.ok))
        self.details.append(f"{mode}: {max(row.relative for row in rows):.1g} apart" if rows else mode)
        return True

    def _error(self, result: Difference, first: Difference) -> CaptureError:
        """Return what to raise for a result that differs; `first` is the first that does, of modules too."""
        asked = "".join(f" The model asks {kind} at {line}." for kind, line in self.questions.asked.items())
        where = ""
        if not first.is_result:
            path = first.module.partition("[")[0].partition("@")[0]
            parents = [path.rsplit(".", up)[0] for up in range(path.count(".") + 1)][:2]
            named = [f"{parent} ({type(self.model.get_submodule(parent)).__name__})" for parent in parents]
            where = (
                f" The first module whose output differs is {' in '.join(named)}, by {first.difference:.2g},"
                f" {first.relative:.1%} of the largest value."
            )
        return CaptureError(
            f"The graph of {type(self.model).__name__} differs from the model on the example inputs in {result.mode}:"
            f" {result.module} by {result.difference:.2g}, {result.relative:.1%} of its largest value.{where}{asked}"
            " The model computes something else while it is traced, or looks at the values of its inputs, of which a"
            " graph follows one case.\nThe way out:"
            f"{self.hint} write that branch in tensor operations (torch.where, torch.cond), or {COMPILE_INSTEAD}."
            " verify=False captures the model all the same, and llfx.verify(graph, model, inputs) lists the"
            " differences."
        )


def follows_each_part(gm: fx.GraphModule, model: nn.Module, call: Call) -> bool:
    """Check that the graph reads the modes of the same parts as the model, on the inputs of a call.

    The two are compared where the parts whose modes the graph reads are in training mode, and no others. An operation
    may follow the mode of another module than the one that runs it: a model may hand its mode down as an argument.

    Args:
        gm, model: neither is changed; they are equal where all parts are in one mode.
        call: the inputs, as both take them.
    """
    parts = parts_with_flags(gm.graph)
    modes = {name: name in parts for name in modes_of(model)}
    if len(set(modes.values())) < 2 or not has_data(model, call):
        return True
    try:
        return all(row.ok for row in _all_rows(gm, model, call, _OF_PARTS, modes))
    except Exception:  # then nothing has shown it
        return False


def differences(gm: fx.GraphModule, model: nn.Module, call: Call) -> tuple[list[Difference], list[str]]:
    """Return the differences between a graph, as a call runs it, and its model, by module and in all modes.

    Args:
        gm, model: neither is changed. Where parts of the model are in other modes, the two are compared in these too.
        call: the inputs, as both take them.

    Returns:
        The differences; and notes on what was not compared.

    Raises:
        CaptureError: the model raises in both modes.
    """
    rows: list[Difference] = []
    notes: list[str] = []
    for mode, where in _modes(model):
        try:
            rows += _compare(gm, model, call, mode, where, by_module=True, as_called=True)
        except _ModelRaises as reason:
            notes.append(f"not compared in {mode}, where the model raises {reason}")
    if not rows:
        raise CaptureError(
            f"The model raises {notes[0].partition('raises ')[2]}. The way out: pass inputs that it takes."
        )
    return rows, notes


def _all_rows(
    gm: fx.GraphModule,
    model: nn.Module,
    call: Call,
    mode: str,
    where: Mode,
    questions: Questions | None = None,
    ran: dict[int, Outputs] | None = None,
) -> list[Difference]:
    """Return the differences of the results; if one is not explained by rounding, those of all modules too."""

    def compared(ran: dict[int, Outputs] | None = None) -> list[Difference]:
        rows = _compare(gm, model, call, mode, where, by_module=False, questions=questions, ran=ran)
        return rows if all(row.ok for row in rows) else _compare(gm, model, call, mode, where, by_module=True)

    try:
        with revealed(model, gm):
            return compared(ran)
    except CaptureError:
        raise
    except Exception:  # a model may decide by values of its parameters
        return compared()


def _compare(
    gm: fx.GraphModule,
    model: nn.Module,
    call: Call,
    mode: str,
    where: Mode,
    by_module: bool,
    as_called: bool = False,
    questions: Questions | None = None,
    ran: dict[int, Outputs] | None = None,
) -> list[Difference]:
    writes = written_parameters(gm, model)
    try:
        # Compare without the modules first, and in any order of draws only if that finds a difference.
        expected = outputs_of_model(model, call, where, writes, by_module, in_any_order=by_module, questions=questions)
        nudged = [outputs_of_model(model, call, where, writes, True, sign) for sign in (1, -1) if by_module]
    except Exception as error:
        raise _ModelRaises(in_one_line(error)) from error
    if expected.kept:
        raise CaptureError(f"{type(model).__name__} {expected.kept}")
    if expected.counted is not None and questions is not None:
        questions.counted = expected.counted
    ran = {} if ran is None else ran
    actual = ran.get(id(call)) or outputs_of_graph(gm, model, call, where, by_module, in_any_order=by_module)
    ran[id(call)] = actual
    if as_called:
        called = outputs_of_program(gm, call, where)
        # A call leaves logits out if its loss is fused; those of the flat graph stand for them.
        made = {name: value for name, value in called.results.items() if value is not None}
        actual = Outputs({**actual.results, **made}, called.buffers, actual.modules)
    return list(_rows(expected, actual, nudged, model, mode, tolerance_for(model, call)))


def _rows(
    expected: Outputs,
    actual: Outputs,
    nudged: Sequence[Outputs],
    model: nn.Module,
    mode: str,
    tolerance: float,
) -> Iterator[Difference]:
    """Yield the differences: the modules in the order in which they finish, then the results, then the buffers.

    Args:
        expected, actual: of the model and the graph.
        nudged: of the model with the last bits of modules' outputs changed.
        model: the model, which has its buffers as they were before a run.
        mode, tolerance: as in `Difference`; the tolerance is relative.
    """

    def row(name: str, ours: Any, theirs: Any, noises: Iterable[Any], is_result: bool) -> Difference:
        scale = largest(theirs)
        is_exact = isinstance(theirs, Tensor) and not (theirs.is_floating_point() or theirs.is_complex())
        allowed = 0.0 if is_exact else tolerance * max(1e-30, scale)
        for noise in noises:
            by_rounding = distance(noise, theirs)
            allowed = max(allowed, _MORE_THAN_A_BIT * by_rounding if math.isfinite(by_rounding) else 0.0)
        return Difference(name, mode, distance(ours, theirs), scale, allowed, is_result)

    for name, outputs in expected.modules.items():
        for index, theirs in enumerate(outputs):
            candidates = [value for value in actual.modules.get(name, ()) if value.shape == theirs.shape]
            if candidates:
                nearest = min(candidates, key=lambda value: distance(value, theirs))
                noises = [run.modules[name][index] for run in nudged]
                yield row(f"{name}[{index}]" if index else name, nearest, theirs, noises, False)
    for name in {**expected.results, **actual.results}:
        ours, theirs = actual.results.get(name, _NOTHING), expected.results.get(name, _NOTHING)
        yield row(name, ours, theirs, [run.results.get(name) for run in nudged], True)
    names: dict[int, list[str]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        names.setdefault(id(buffer), []).append(name)
    for name, before in model.named_buffers():
        # The graph writes to one of the names of a buffer, and lacks those buffers that it does not use.
        aliases = [actual.buffers[alias] for alias in names[id(before)] if alias in actual.buffers] or [before]
        after = expected.buffers.get(name, before)
        ours = min(aliases, key=lambda value: distance(value, after))
        # A buffer that changes its shape is a cache that grows: a graph computes anew what is in it.
        if after.shape == ours.shape and distance(ours, after):
            yield row(f"buffer {name}", ours, after, [run.buffers.get(name) for run in nudged], True)


class _ModelRaises(Exception):
    """The model raises for the inputs; the message says what."""


def _modes(model: nn.Module) -> list[tuple[str, Mode]]:
    """Return the modes to compare in, by name: evaluation, training, and those that the parts have if they differ."""
    modes = modes_of(model)
    of_parts = [(_OF_PARTS, modes)] if len(set(modes.values())) > 1 else []
    return [("evaluation", False), ("training", True), *of_parts]
