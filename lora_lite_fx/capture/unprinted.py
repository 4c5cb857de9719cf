"""Keep torch from printing what it makes of errors that are caught: tracebacks, and graphs that were half traced."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# It logs the traceback of each operator that fails without data, before it raises the error.
_FAKE_TENSORS = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def failures_unlogged() -> Iterator[None]:
    """Run operators on tensors without data, and let nothing be logged of those that fail."""
    disabled, _FAKE_TENSORS.disabled = _FAKE_TENSORS.disabled, True
    try:
        yield
    finally:
        _FAKE_TENSORS.disabled = disabled


@contextmanager
def graphs_unprinted() -> Iterator[None]:
    """Let torch.export print no graph of a trace that fails, which may have thousands of lines.

    It prints one to stderr, where a model decides by values, and no option leaves it out.
    """
    with contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)):
        yield


class _WithoutGraphs:
    """A stream that passes on all but the code of graphs, and the ends of their last lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left_out = False

    def write(self, text: str) -> int:
        """Write `text` to the stream, unless it is a graph."""
        self._left_out = text.lstrip().startswith("def forward(self, arg") or (self._left_out and text == "\n")
        if self._stream is not None and not self._left_out:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
