"""Keep torch from printing what is of no use to a user: of errors that are caught, and of a capture."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..compat.torch import FAKE_TENSORS_LOG

_FLAT = r"self\.([\w.]+\.)?_flat_weights\[\d+\]"


@contextmanager
def failures_unlogged() -> Iterator[None]:
    """Run operators on tensors without data, and let nothing be logged of those that fail."""
    if FAKE_TENSORS_LOG is None:
        yield
        return
    # It logs the traceback of each operator that fails without data, before it raises the error.
    disabled, FAKE_TENSORS_LOG.disabled = FAKE_TENSORS_LOG.disabled, True
    try:
        yield
    finally:
        FAKE_TENSORS_LOG.disabled = disabled


@contextmanager
def quiet_export() -> Iterator[None]:
    """Let torch.export log no warnings of no use, and print no graph of a trace that fails.

    It prints one to stderr, of thousands of lines, where a model decides by values, and no option leaves it out.
    """
    from ..compat.dynamo import EXPORT_LOG

    needless = (
        (EXPORT_LOG, "0/1 specialized"),  # a size of one stays fixed, as the guards of the graph say
        # It says that an error comes without advice.
        (logging.getLogger("torch.fx.experimental.symbolic_shapes"), "Unable to find user code"),
    )
    with (
        contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)),
        warnings.catch_warnings(),
        contextlib.ExitStack() as stack,
    ):
        # torch.nn's recurrent layers list their weights again whenever one is set. The graph reads the weights.
        warnings.filterwarnings("ignore", rf"The tensor attributes ({_FLAT}, )*{_FLAT} were assigned during export")
        for logger, text in needless:
            if logger is not None:
                without = functools.partial(_is_without, text)
                logger.addFilter(without)
                stack.callback(logger.removeFilter, without)
        yield


def _is_without(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


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
