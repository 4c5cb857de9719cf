"""The command line: `python -m lora_lite_fx inspect MODEL` prints the sites of a model and what they do.

This file reads the options. `inspection/command.py` does the work, because it needs torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 2 for bad input, with one line on stderr that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lora_lite_fx", description="Adapters by rewriting torch.fx graphs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="the sites of a model: their roles, sizes and adapters")
    command.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, hub id or config.json; or an exported program (.pt2)"
    )
    command.add_argument(
        "--adapter", metavar="PATH", help="a file that save() wrote, or a PEFT directory, to show on it"
    )
    command.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, because it registers a variant of your own; the current folder is searched too,"
        " and the option can be given again",
    )
    command.add_argument("--passes", action="store_true", help="show what each optimizing pass did, and why not more")
    command.add_argument("--json", action="store_true", help="print data in place of the table")
    command.add_argument("--html", metavar="FILE", help="write one HTML page with the model as a picture")
    command.add_argument(
        "--trust",
        action="store_true",
        help="open a .pt2 file, which may run code that can do whatever you can: only if you trust whoever made it",
    )
    options = parser.parse_args(arguments)
    package = sys.modules[__package__]
    if not hasattr(package, "inspect"):
        importlib.reload(package)  # with all public names, which it left out for the program
    from .inspection.command import run

    return run(options, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
