"""kill -9 before each call by which a writer changes the disk, see `kill_writers.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.kill_writers import WRITERS, at_each_call
from tests.support.selection import slow_unless


@pytest.mark.broad
@pytest.mark.parametrize("over_old", slow_unless(bool, [True, False]), ids=["over an old one", "a new one"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new(writer: str, over_old: bool, tmp_path: Path) -> None:
    outcomes = list(at_each_call(writer, tmp_path, over_old=over_old))
    states = [state for state, _ in outcomes]
    allowed = {"version 0" if over_old else "nothing", "version 1"}
    if writer == "save_peft":
        allowed |= {"an error"}  # there is no config between the old pair and the new
    assert set(states) <= allowed
    assert states[0] == ("version 0" if over_old else "nothing")
    assert states[-1] == "version 1"
    assert len(states) >= 4
    # Between its naming and its renaming a file has another name, which the next write to the folder removes.
    assert sum(bool(left) for _, left in outcomes) <= (2 if writer == "save_peft" else 1)
