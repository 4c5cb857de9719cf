"""Print one of the two commands of README.md, so that CI runs what the README says: `main-job` or `tests`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
COMMANDS = ("main-job", "tests")


def readme_command(name: str, readme: str) -> str:
    """Return the command called `name`: the README shows one in each of its `bash` blocks, in the order of COMMANDS.

    Raises:
        ValueError: the name is unknown, or the README does not have as many blocks of one line each.
    """
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: the README has {' and '.join(COMMANDS)}")
    blocks: list[str] = re.findall(r"^```bash\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    if len(blocks) != len(COMMANDS) or any(block.count("\n") != 1 for block in blocks):
        raise ValueError(f"the README must have {len(COMMANDS)} bash blocks of one line, it has {blocks}")
    return blocks[COMMANDS.index(name)].strip()


if __name__ == "__main__":
    print(readme_command(sys.argv[1], README.read_text(encoding="utf-8")))
