"""Write the graph around each pass that changes it to a folder, for whoever debugs a pass."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import fx

from ..graph.queries import model_name

_VARIABLE = "LORA_LITE_FX_DUMP"
_numbers: Iterator[int] = itertools.count()


class Dump:
    """The files of one run of a pipeline, in the folder that the environment variable `LORA_LITE_FX_DUMP` names.

    Each run that changes a graph has a folder in it: `012_inference_of_Llama`, or `003_graph_of_Llama` for passes that
    make no program, such as those that insert adapters. The number counts the runs of this process. The files hold the
    graph as code, with shapes, dtypes and the lines of the model; comments say what the pass did.

    | file | written |
    |---|---|
    | `05_share_siblings.before.txt`, `.after.txt` | by a pass that changed the graph |
    | `05_share_siblings.before.txt`, `.failed.txt` | by a pass that failed: its error, and the graph as it left it |

    Args:
        gm: the module whose graph the passes change.
        program: the name of the program that they make of it, or None.
    """

    def __init__(self, gm: fx.GraphModule, program: str | None) -> None:
        self.gm = gm
        self.root = os.environ.get(_VARIABLE)
        self.folder: Path | None = None
        self.kind = program or "graph"
        self.place = -1

    def begin(self, name: str) -> None:
        """Keep the text of the graph, because the pass of this name is about to run."""
        self.name = name
        self.place += 1
        self.before = _text(self.gm.graph) if self.root else ""

    def succeeded(self, edits: int, reasons: Iterable[str]) -> None:
        """Write the graph before and after the pass, if the pass changed it."""
        if not self.root:
            return
        after = _text(self.gm.graph)
        if edits or after != self.before:
            comments = [f"{self.name}: {edits or 'no'} edit{'s' * (edits != 1)}"]
            comments += [f"{self.name}: {reason}" for reason in reasons]
            self._write({"before": self.before, "after": _commented(comments) + after})

    def failed(self, error: Exception) -> None:
        """Write the graph before the pass, and what the pass left of it, with the error."""
        if self.root:
            comment = f"{self.name} failed: {type(error).__name__}: {error}"
            self._write({"before": self.before, "failed": _commented(comment.splitlines()) + _text(self.gm.graph)})

    def _write(self, texts: dict[str, str]) -> None:
        if self.folder is None:
            self.folder = Path(self.root or "") / f"{next(_numbers):03d}_{self.kind}_of_{model_name(self.gm)}"
            self.folder.mkdir(parents=True, exist_ok=True)
        for when, text in texts.items():
            (self.folder / f"{self.place:02d}_{self.name}.{when}.txt").write_text(text, encoding="utf-8")


def _commented(lines: Iterable[str]) -> str:
    return "".join(f"# {line}\n" for line in lines)


def _text(graph: fx.Graph) -> str:
    """Return the graph as code; of a graph that a failing pass has left broken, the nodes that can be printed."""
    try:
        return f"{graph.python_code('self', verbose=True).src.strip()}\n"
    except Exception as error:
        lines = [f"# The graph cannot be printed as a whole: {type(error).__name__}: {error}"]
        for node in graph.nodes:
            try:
                lines.append(f"    {node.format_node() or node.name}")
            except Exception as of_node:
                lines.append(f"    # {node.name} cannot be printed: {type(of_node).__name__}: {of_node}")
        return "\n".join(lines) + "\n"
