"""Write the text of a graph around each pass to a folder, for whoever debugs a pass."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import fx

_VARIABLE = "LORA_LITE_FX_DUMP"
_numbers: Iterator[int] = itertools.count()


class Dump:
    """The files of one pass, in the folder that the environment variable `LORA_LITE_FX_DUMP` names.

    They are numbered in the order in which the passes of this process ran. Each begins with comment lines.

    | file | written |
    |---|---|
    | `007_share_siblings.before.txt`, `.after.txt` | by a pass that changed the graph |
    | `007_share_siblings.txt` | by a pass that made no edit: its reasons, and no graph |
    | `007_share_siblings.before.txt`, `.failed.txt` | by a pass that failed: the error, and what prints of the graph |

    Args:
        name: of the pass, which is about to run.
        gm: its module.
    """

    def __init__(self, name: str, gm: fx.GraphModule) -> None:
        self.name, self.gm = name, gm
        self.folder = os.environ.get(_VARIABLE)
        self.before = _text(gm.graph) if self.folder else ""

    def succeeded(self, edits: int, reasons: Iterable[str]) -> None:
        """Write the graph before and after the pass, or one file without a graph if nothing changed."""
        if not self.folder:
            return
        after = _text(self.gm.graph)
        comments = [f"{self.name}: {edits or 'no'} edit{'s' * (edits != 1)}"]
        comments += [f"{self.name}: {reason}" for reason in reasons]
        if edits == 0 and after == self.before:
            self._write({"": _commented(comments)})
        else:
            self._write({".before": self.before, ".after": _commented(comments) + after})

    def failed(self, error: Exception) -> None:
        """Write the graph before the pass, and what the pass left of it, with the error."""
        if self.folder:
            comment = f"{self.name} failed: {type(error).__name__}: {error}"
            lines = _commented(comment.splitlines()) + _text(self.gm.graph)
            self._write({".before": self.before, ".failed": lines})

    def _write(self, texts: dict[str, str]) -> None:
        folder = Path(self.folder or "")
        folder.mkdir(parents=True, exist_ok=True)
        number = next(_numbers)
        for when, text in texts.items():
            (folder / f"{number:03d}_{self.name}{when}.txt").write_text(text, encoding="utf-8")


def _commented(lines: Iterable[str]) -> str:
    return "".join(f"# {line}\n" for line in lines)


def _text(graph: fx.Graph) -> str:
    """Return the graph as text; of a graph that a failing pass has left broken, the nodes that can be printed."""
    try:
        return f"{graph}\n"
    except Exception as error:
        lines = [f"# The graph cannot be printed as a whole: {type(error).__name__}: {error}"]
        for node in graph.nodes:
            try:
                lines.append(f"    {node.format_node() or node.name}")
            except Exception as of_node:
                lines.append(f"    # {node.name} cannot be printed: {type(of_node).__name__}: {of_node}")
        return "\n".join(lines) + "\n"
