"""Let many threads run graphs at once, and one thread alone trace.

While torch traces a model it replaces `nn.Module.__call__`, and says that it compiles, for all threads. A call in
another thread would be recorded in the trace, and would take itself for a part of it.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_changed = threading.Condition()
_calls: Counter[int] = Counter()
"""How deep each thread is in calls, by its identifier."""
_waiting: set[int] = set()
"""The threads that wait to trace. What they run meanwhile stands still."""
_tracing: list[int] = []
"""The thread that traces, as often as its traces are nested."""


@contextmanager
def calling() -> Iterator[None]:
    """Run graphs inside, beside other threads that do. Wait for a thread that traces, or that waits for its turn."""
    thread = threading.get_ident()
    with _changed:
        if thread not in _calls and thread not in _tracing:
            _changed.wait_for(lambda: not _tracing and not _waiting)
        _calls[thread] += 1
    try:
        yield
    finally:
        with _changed:
            _calls[thread] -= 1
            if not _calls[thread]:
                del _calls[thread]
                _changed.notify_all()


@contextmanager
def tracing() -> Iterator[None]:
    """Trace inside, or change what graphs share, while no other thread runs a graph. Inside a call, the call waits."""
    thread = threading.get_ident()
    with _changed:
        if thread not in _tracing:
            _waiting.add(thread)
            try:
                _changed.wait_for(lambda: not _tracing and _calls.keys() <= _waiting)
            finally:
                _waiting.discard(thread)
                _changed.notify_all()
        _tracing.append(thread)
    try:
        yield
    finally:
        with _changed:
            _tracing.pop()
            _changed.notify_all()


@contextmanager
def collection_put_off() -> Iterator[None]:
    """Collect no garbage in the body.

    A capture makes a million objects, of which most stay: looking through them again and again takes a tenth of its
    time. What no cycle keeps is freed at once as ever.
    """
    if not gc.isenabled():  # by the caller, or by a body around this one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
