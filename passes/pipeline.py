"""Passes and pipelines: how a graph is changed."""

from __future__ import annotations

import itertools
import os
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import fx

from ..errors import AdapterError
from ..graph.writes import written

Program = Literal["training", "checkpointed", "inference"]
"""What is derived from a graph: for use with gradients, in training mode or under `torch.compile`; for training mode
with layers that keep only their inputs and run again in the backward pass; and for evaluation without gradients."""


class GraphPass(ABC):
    """One change to a graph. Subclasses are frozen dataclasses; their docstring says why the change is safe."""

    programs: ClassVar[frozenset[Program]] = frozenset(get_args(Program))
    """Which of the programs that are derived from an adapted graph it optimizes."""

    @property
    def name(self) -> str:
        """The class name in snake case."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> int:
        """Change `gm` in place; returns the number of edits, 0 if there was nothing to do."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its name, its number of edits, and the seconds it took."""

    name: str
    edits: int
    seconds: float


class PassError(AdapterError, RuntimeError):
    """A pass failed unexpectedly; the message names it and the passes that ran before."""


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes.

    Running it does what every pass needs: it times the pass, removes dead code and lints the graph, writes its text
    before and after each pass to the folder `LORA_LITE_FX_DUMP` if that is set, and names the pass in any error.
    The module is recompiled at the end, once.
    """

    passes: tuple[GraphPass, ...]

    def __iter__(self) -> Iterator[GraphPass]:
        return iter(self.passes)

    def without(self, *names: str) -> Pipeline:
        """The pipeline without the passes of these names.

        Raises:
            ValueError: it has no pass of such a name.
        """
        known = [graph_pass.name for graph_pass in self.passes]
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"No pass is named {', '.join(unknown)}; the pipeline has {', '.join(known)}.")
        return Pipeline(tuple(graph_pass for graph_pass in self.passes if graph_pass.name not in names))

    def of(self, program: Program) -> Pipeline:
        """The passes that optimize this program."""
        return Pipeline(tuple(graph_pass for graph_pass in self.passes if program in graph_pass.programs))

    def run(self, gm: fx.GraphModule) -> list[PassReport]:
        """Run all passes on `gm`, in place.

        Raises:
            AdapterError: a pass refused its input (its own error, with a note naming the pass).
            PassError: a pass failed unexpectedly.
        """
        reports: list[PassReport] = []
        for graph_pass in self.passes:
            before = str(gm.graph) if _dump_folder() else ""
            start = time.perf_counter()
            try:
                edits = graph_pass.run(gm)
                _clean(gm)
            except Exception as error:
                done = ", ".join(report.name for report in reports) or "none"
                where = f"in pass {graph_pass.name} (passes that ran before: {done})"
                if isinstance(error, AdapterError):
                    error.add_note(where)
                    raise
                raise PassError(f"{type(error).__name__} {where}: {error}") from error
            reports.append(PassReport(graph_pass.name, edits, time.perf_counter() - start))
            if before:
                _dump(graph_pass.name, before, str(gm.graph))
        gm.recompile()
        return reports


def _clean(gm: fx.GraphModule) -> None:
    eliminate_dead_code(gm)
    with warnings.catch_warnings():
        # lint expects a get_attr to name a tensor; the mode flag `training` is read the same way.
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
        gm.graph.lint()


def eliminate_dead_code(gm: fx.GraphModule) -> None:
    """Remove what nobody reads and what changes nothing: fx takes calls of methods and modules to be of that kind."""
    gm.graph.eliminate_dead_code(lambda node: node.is_impure() or node.op == "call_module" or bool(written(gm, node)))


def _dump_folder() -> str | None:
    return os.environ.get("LORA_LITE_FX_DUMP")


_numbers: Iterable[int] = itertools.count()


def _dump(name: str, before: str, after: str) -> None:
    folder = Path(_dump_folder() or "")
    folder.mkdir(parents=True, exist_ok=True)
    number = next(iter(_numbers))
    for when, text in (("before", before), ("after", after)):
        (folder / f"{number:03d}_{name}.{when}.txt").write_text(text + "\n", encoding="utf-8")
