"""Passes, and pipelines that run them."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import fx

from ..capture.capture_model import Inputs
from ..capture.origins.wrong_arguments import check_inputs
from ..compat.torch import is_transform
from ..errors import AdapterError, ConfigError, shown
from ..graph.insertion import place_of
from ..graph.writes import written
from .check import Check, Modes
from .dump import Dump

Program = Literal["plain", "training", "checkpointed", "inference", "exported"]
"""One way to run an adapted graph. Each has its own copy of the graph:

- `plain`: as it is, in transforms of `torch.func`, forward-mode AD and traces of `torch.jit`;
- `training`: optimized for calls of which nothing is kept, with gradients or without;
- `checkpointed`: in training mode, with layers that keep only their inputs and run again in the backward pass;
- `inference`: in evaluation mode without gradients, inside a scope of `frozen`;
- `exported`: as it is, by strict `torch.export`, `torch.fx.symbolic_trace` and `make_fx`, which find the records of the
  adapters on what they trace.
"""

OPTIMIZED: frozenset[Program] = frozenset(("training", "checkpointed", "inference"))
"""The programs that passes optimize."""


@dataclass(frozen=True)
class Declined:
    """A candidate that a pass looked at and left as it is.

    Args:
        sites: qualified names of the sites, or of the modules, that it belongs to; empty for the whole graph.
        why: the reason, in a few words.
    """

    sites: tuple[str, ...]
    why: str

    @classmethod
    def at(cls, nodes: Iterable[fx.Node], why: str) -> Declined:
        """Make the record of a candidate that consists of `nodes`."""
        return cls(tuple(dict.fromkeys(map(place_of, nodes))), why)

    def __str__(self) -> str:
        return f"{', '.join(self.sites)}: {self.why}" if self.sites else self.why


@dataclass(frozen=True)
class Outcome:
    """The result of a pass, with reasons.

    Args:
        edits: the number of edits.
        declined: the candidates that the pass left as they are.
    """

    edits: int
    declined: tuple[Declined, ...] = ()


class GraphPass(ABC):
    """One change to a graph. Subclasses are frozen dataclasses; their docstring says why the change is safe."""

    programs: ClassVar[frozenset[Program]] = OPTIMIZED
    """The programs that the pass optimizes."""

    option: ClassVar[str] = ""
    """The option of `rewrite` that asks for the pass, which else does not run: it changes what a call returns."""

    @property
    def name(self) -> str:
        """The class name in snake case."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> int | Outcome:
        """Change `gm` in place.

        Returns:
            The number of edits, 0 if there was nothing to do; or an `Outcome`, to give reasons too.
        """


@dataclass(frozen=True)
class PassReport:
    """The report of one pass.

    Args:
        name: of the pass.
        edits: the number of its edits.
        seconds: the time it took.
        declined: the candidates that it left as they are, with reasons.
    """

    name: str
    edits: int
    seconds: float
    declined: tuple[Declined, ...] = ()


class PassError(AdapterError, RuntimeError):
    """A pass failed unexpectedly, or a check found it wrong. The message names the pass."""


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes.

    Around each pass it does the work that every pass needs: it times the pass, removes dead code, names the pass in
    errors, and writes the graph's text to the folder `LORA_LITE_FX_DUMP` if that is set. It lints the graph after each
    pass that is not of this library, because a lint takes longer than most passes, and once at the end. Then it
    recompiles the module.

    Args:
        passes: objects of subclasses of `GraphPass`.
        check: inputs of the graph, as a tuple of positional or a dict of keyword arguments, to find a wrong pass. The
            graph runs on them before and after each pass. The first pass after which a result, a gradient or a buffer
            differs, or a `meta["val"]` has another shape or dtype than the value, is an error. Gradients are those of
            trainable parameters and of inputs that require one; those a million times smaller than the largest are
            not told from zero.

    Raises:
        ConfigError: something is not a pass.
        CaptureError: `check` is neither a tuple nor a dict.
    """

    passes: tuple[GraphPass, ...]
    check: Inputs | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        passes: Any = self.passes
        if isinstance(passes, GraphPass) or not isinstance(passes, Iterable):
            raise ConfigError(f"Pipeline takes a tuple of passes, not {shown(passes)}.")
        object.__setattr__(self, "passes", tuple(passes))
        for graph_pass in self.passes:
            _require_pass(graph_pass)
        if self.check is not None:
            check_inputs(self.check, "check")

    def __iter__(self) -> Iterator[GraphPass]:
        return iter(self.passes)

    def without(self, *names: str) -> Pipeline:
        """Return the pipeline without the passes of these names.

        Raises:
            ConfigError: the pipeline has no pass of such a name.
        """
        self._places(names)
        return self._of(graph_pass for graph_pass in self.passes if graph_pass.name not in names)

    def before(self, name: str, *passes: GraphPass) -> Pipeline:
        """Return the pipeline with `passes` right before the pass of that name.

        Raises:
            ConfigError: the pipeline has no pass of that name, or something is not a pass.
        """
        place = self._places([name])[0]
        return self._of([*self.passes[:place], *passes, *self.passes[place:]])

    def after(self, name: str, *passes: GraphPass) -> Pipeline:
        """Return the pipeline with `passes` right after the pass of that name.

        Raises:
            ConfigError: the pipeline has no pass of that name, or something is not a pass.
        """
        place = self._places([name])[-1] + 1
        return self._of([*self.passes[:place], *passes, *self.passes[place:]])

    def of(self, program: Program, option: str = "") -> Pipeline:
        """Return the passes that optimize this program: those that an option asks for, or those that none asks for."""
        return self._of(each for each in self.passes if program in each.programs and each.option == option)

    def _of(self, passes: Iterable[GraphPass]) -> Pipeline:
        return Pipeline(tuple(passes), self.check)

    def _places(self, names: Sequence[str]) -> list[int]:
        """Return the places of the passes of these names; raise ConfigError if there is none of one of them."""
        known = [graph_pass.name for graph_pass in self.passes]
        if unknown := sorted(set(names) - set(known)):
            raise ConfigError(f"No pass is named {', '.join(unknown)}; the pipeline has {', '.join(known) or 'none'}.")
        return [place for place, name in enumerate(known) if name in names]

    def run(self, gm: fx.GraphModule, program: Program | None = None) -> list[PassReport]:
        """Run all passes on `gm`, in place.

        Args:
            gm: the module whose graph the passes change.
            program: the program that they make of it, if they do: a check runs it in the modes in which it is called.

        Raises:
            AdapterError: a pass refused its input. It is the pass's own error, with a note that names the pass.
            PassError: a pass failed unexpectedly, or returned neither a number of edits nor an `Outcome`, or a check
                found it wrong.
            CallError: the graph does not take the inputs of the check.
        """
        reports: list[PassReport] = []
        dump = Dump(gm, program)
        check = None if self.check is None else Check(gm, self.check, _modes(gm, program))
        for graph_pass in self.passes:
            dump.begin(graph_pass.name)
            start = time.perf_counter()
            try:
                outcome = _outcome(graph_pass.run(gm))
                if outcome.edits or not reports:  # the first pass may be given dead code
                    eliminate_dead_code(gm)
                if outcome.edits and is_of_others(graph_pass):
                    gm.graph.lint()
                seconds = time.perf_counter() - start
                if check is not None and (complaint := check.complaint(gm)):
                    raise PassError(f"Pass {graph_pass.name} {complaint}")
            except Exception as error:
                dump.failed(error)
                done = ", ".join(report.name for report in reports) or "none"
                where = f"in pass {graph_pass.name} (passes that ran before: {done})"
                if isinstance(error, AdapterError):
                    error.add_note(where)
                    raise
                raise PassError(f"{type(error).__name__} {where}: {error}") from error
            declined = tuple(dict.fromkeys(outcome.declined))
            reports.append(PassReport(graph_pass.name, outcome.edits, seconds, declined))
            dump.succeeded(outcome.edits, map(str, declined))
        if any(report.edits for report in reports):
            try:
                gm.graph.lint()
            except Exception as error:
                done = ", ".join(report.name for report in reports)
                raise PassError(f"{type(error).__name__} after the passes {done}: {error}") from error
        gm.recompile()
        return reports


def _require_pass(value: object) -> None:
    if isinstance(value, GraphPass):
        return
    name = getattr(value, "__name__", "")
    if isinstance(value, type) and issubclass(value, GraphPass):
        raise ConfigError(f"{name} is a class, and a pipeline takes its objects. The way out: {name}().")
    what = f"{shown(value)} {name}".rstrip() if not isinstance(value, type) else shown(value)
    raise ConfigError(f"A pipeline takes passes, which are objects of subclasses of GraphPass, not {what}.")


def _modes(gm: fx.GraphModule, program: Program | None) -> Modes:
    """Return the modes in which a program is called, or in which `gm` is."""
    if program == "inference":
        return ((False, False),)
    if program == "training":
        return ((False, True), (True, True))
    return ((True if program == "checkpointed" else gm.training, True),)


def _outcome(result: object) -> Outcome:
    outcome = result if isinstance(result, Outcome) else Outcome(result)  # type: ignore[arg-type]
    if not isinstance(outcome.edits, int):
        raise TypeError(f"run must return the number of edits as an int, or an Outcome; it returned {result!r}")
    return outcome


def is_of_others(graph_pass: GraphPass) -> bool:
    """Tell whether a pass is not of this library, whose tests lint after each of its own."""
    return type(graph_pass).__module__.partition(".")[0] != __name__.partition(".")[0]


def eliminate_dead_code(gm: fx.GraphModule) -> None:
    """Remove the nodes that nothing reads and that have no effect.

    Calls of modules stay, and so does every node that writes in place or that begins or ends a level of a transform:
    torch.fx by itself would remove some. It would lint the graph each time too.
    """
    for node in reversed(gm.graph.nodes):
        stays = node.users or node.op == "call_module" or node.is_impure() or is_transform(node) or written(gm, node)
        if not stays:
            gm.graph.erase_node(node)
