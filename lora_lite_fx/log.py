"""Log lines and progress bars: they tell a user what the library is doing.

Each phase (capture, sites found, adapters inserted, program derived) is one line at INFO by the logger `lora_lite_fx`:
`logging.basicConfig(level="INFO")` shows them. `backend` has the same phases: it records a run of the model in place of
capture, and inserts adapters into each graph of torch.compile, from which it derives a program.

A phase that takes longer than three seconds says so while it runs: at INFO by the logger, or, if that is not on, on
stderr where it is a terminal. `logging.getLogger("lora_lite_fx").setLevel("ERROR")` turns that off, and the bars.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

logger = logging.getLogger("lora_lite_fx")

T = TypeVar("T")

SECONDS_BEFORE_A_BAR = 2
SECONDS_BEFORE_A_LINE = 3
SECONDS_OF_A_LOOK_UP = 2


@contextmanager
def phase(done: str, doing: str | None = None) -> Iterator[list[str]]:
    """Log one line when the body has ended: the name of the phase, details, and the seconds that it took.

    A body that raises logs nothing, because its error says more.

    Args:
        done: what was done, in the past tense: `"captured Net"`.
        doing: the same in the present, `"capturing Net"`, for a line while it runs if it takes long. None for phases
            with a bar.

    Yields:
        A list to which the body appends details, such as counts.
    """
    details: list[str] = []
    start = time.perf_counter()
    with waiting(doing):
        yield details
    seconds = time.perf_counter() - start
    logger.info("%s in %.1f s%s", done, seconds, f": {', '.join(details)}" if details else "")


@contextmanager
def waiting(doing: str | None, seconds: float | None = None) -> Iterator[None]:
    """Say what the body does if it takes long, where somebody waits for it.

    Args:
        doing: what it does, such as `"capturing Net"`; None to say nothing.
        seconds: after which it says so; `SECONDS_BEFORE_A_LINE` if None.
    """
    stderr = sys.stderr  # of now, because torch.export's is another one
    if doing is None or not (logger.isEnabledFor(logging.INFO) or _is_watched(stderr)):
        yield
        return
    timer = threading.Timer(SECONDS_BEFORE_A_LINE if seconds is None else seconds, _say, (f"{doing} ...", stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def looking_up(name: str) -> AbstractContextManager[None]:
    """Say after two seconds that the body waits for a look-up or a download of the Hugging Face hub."""
    return waiting(f"asking the Hugging Face hub for {name}; HF_HUB_OFFLINE=1 reads what is here", SECONDS_OF_A_LOOK_UP)


def _say(line: str, stderr: Any) -> None:
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        print(f"lora_lite_fx: {line}", file=stderr, flush=True)


def _is_watched(stderr: Any) -> bool:
    """Check whether somebody sees stderr and has not turned the lines off."""
    return stderr is not None and stderr.isatty() and logger.isEnabledFor(logging.WARNING)


def progress(items: Iterable[T], name: str) -> Iterable[T]:
    """Iterate over `items` with a progress bar on stderr, which appears after two seconds.

    Without a terminal, or without tqdm, there is no bar.
    """
    if not _is_watched(sys.stderr):
        return items
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with transformers, and is not a dependency of this library
        return items
    bar: Iterable[T] = tqdm(items, desc=name, delay=SECONDS_BEFORE_A_BAR, leave=False)
    return bar
