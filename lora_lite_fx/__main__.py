"""The command line: `inspect MODEL` prints the sites of a model, `export MODEL --to onnx OUT` writes it for a runtime.

This file reads the options. `inspection/inspect_command.py` and `hand_over/export_command.py` do the work, because they
need torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .hand_over.targets import TARGETS, complaint
from .log import waiting


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_inspect(commands)
    _add_export(commands)
    options = parser.parse_args(arguments)
    if options.command == "export" and (wrong := complaint(options)) is not None:
        print(f"{parser.prog}: error: {wrong}", file=sys.stderr)
        return 2
    package = sys.modules[__package__]
    file = {"inspect": "inspection.inspect_command", "export": "hand_over.export_command"}[options.command]
    with waiting("importing torch"):
        if not hasattr(package, "inspect"):
            importlib.reload(package)  # with all public names, which it left out for the program
        command = importlib.import_module(f".{file}", __package__)
    status: int = command.run(options, parser.prog)
    return status


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="the sites of a model: their roles, sizes and adapters")
    _add_model(command, "a Hugging Face folder, hub id or config.json; or an exported program (.pt2)")
    command.add_argument("--passes", action="store_true", help="show what each optimizing pass did, and why not more")
    command.add_argument("--json", action="store_true", help="print data in place of the table")
    command.add_argument("--html", metavar="FILE", help="write one HTML page with the model as a picture")


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a model with its adapter for a runtime, and compare it there")
    _add_model(command, "a Hugging Face folder or hub id; or, for programs, an exported program (.pt2)")
    add = command.add_argument
    add("--to", required=True, choices=TARGETS, help="the runtime, or merged for the model's own files")
    add("out", metavar="OUT", help="the file to write; a folder for executorch, merged, openvino, sglang and vllm")
    add("--outputs", metavar="NAMES", help="fields of the model's output, divided by commas (default: all tensors)")
    add("--cache", action="store_true", help="write a step of a causal language model, with its cache as tensors")
    add("--bake", action="store_true", help="make constants of what depends on parameters alone")
    add("--name", help="for executorch: the name of the program (default: that of the adapter's file)")
    add("--overwrite", action="store_true", help="replace what is there")


def _add_model(command: argparse.ArgumentParser, model: str) -> None:
    command.add_argument("model", metavar="MODEL", help=model)
    command.add_argument("--adapter", metavar="PATH", help="a file that save() wrote, or a PEFT directory")
    command.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, because it registers a variant of your own; the current folder is searched too,"
        " and the option can be given again",
    )
    command.add_argument(
        "--trust",
        action="store_true",
        help="open a .pt2 file, which may run code that can do whatever you can: only if you trust whoever made it",
    )


if __name__ == "__main__":
    sys.exit(main())
