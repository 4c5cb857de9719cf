"""Log lines and progress bars: they tell a user what the library is doing.

Each phase (capture, sites found, adapters inserted, program derived) is one line at INFO by the logger `lora_lite_fx`:
`logging.basicConfig(level="INFO")` shows them. `backend` has the same phases: it records a run of the model in place of
capture, and inserts adapters into each graph of torch.compile, from which it derives a program.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

logger = logging.getLogger("lora_lite_fx")

T = TypeVar("T")

SECONDS_BEFORE_A_BAR = 2


@contextmanager
def phase(name: str) -> Iterator[list[str]]:
    """Log one line when the body has ended: the name of the phase, details, and the seconds that it took.

    A body that raises logs nothing, because its error says more.

    Args:
        name: what was done, in the past tense: `"captured Net"`.

    Yields:
        A list to which the body appends details, such as counts.
    """
    details: list[str] = []
    start = time.perf_counter()
    yield details
    seconds = time.perf_counter() - start
    logger.info("%s in %.1f s%s", name, seconds, f": {', '.join(details)}" if details else "")


def progress(items: Iterable[T], name: str) -> Iterable[T]:
    """Iterate over `items` with a progress bar on stderr, which appears after two seconds.

    Without a terminal, or without tqdm, there is no bar.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with transformers, and is not a dependency of this library
        return items
    bar: Iterable[T] = tqdm(items, desc=name, delay=SECONDS_BEFORE_A_BAR, leave=False)
    return bar
