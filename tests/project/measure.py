"""Measure how much code there is to know: lines by wing, and the files and functions that each way of a user runs.

Run `python -m tests.project.measure` at the root.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.project.test_layers import NAME, ROOT, module_files

PACKAGE = ROOT / NAME


def lines_by_wing() -> Counter[str]:
    """Return how many lines each wing has, comments and blank lines included."""
    lines: Counter[str] = Counter()
    for module, file in module_files(PACKAGE).items():
        lines[module.split(".")[0]] += len(file.read_text(encoding="utf-8").splitlines())
    return lines


def long_files(limit: int) -> dict[str, int]:
    """Return the modules of more than `limit` lines, with their lines."""
    lengths = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in _modules()}
    return {module: length for module, length in lengths.items() if length > limit}


def long_functions(limit: int) -> dict[str, int]:
    """Return the functions of more than `limit` lines, docstring included, with their lines."""
    found = {}
    for module, file in _modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > limit:
                    found[f"{module}.{node.name}"] = length
    return found


def _modules() -> Iterator[tuple[str, Path]]:
    yield from module_files(PACKAGE).items()


def code_run_by(action: Callable[[], Any]) -> set[tuple[str, str]]:
    """Return the files and the functions of the package that `action` runs, without lambdas and comprehensions."""
    ran: set[tuple[str, str]] = set()
    folders = (str(PACKAGE), str((PACKAGE / "passes").resolve()))

    def record(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folders) and not code.co_name.startswith("<"):
            ran.add((str(Path(code.co_filename).resolve()), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        action()
    finally:
        sys.setprofile(before)
    return ran


def ways() -> dict[str, set[tuple[str, str]]]:
    """Return the code that each way of a user runs, on a tiny Llama of four layers."""
    import torch
    from transformers import LlamaForCausalLM

    import lora_lite_fx as llfx
    from tests.support.models import tiny_llama

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(num_hidden_layers=4))
    ids = torch.randint(1, 90, (2, 7))
    results: dict[str, Any] = {}
    ran: dict[str, set[tuple[str, str]]] = {}

    def run(name: str, action: Callable[[], Any]) -> None:
        ran[name] = code_run_by(lambda: results.update({name: action()}))

    run("rewrite", lambda: llfx.rewrite(model, llfx.LoRA()))
    gm = results["rewrite"]
    run("first training call", lambda: gm(input_ids=ids))
    run("later training call", lambda: gm(input_ids=ids))
    run("adapt and its first call", lambda: llfx.adapt(model, llfx.LoRA())(input_ids=ids))
    with tempfile.TemporaryDirectory() as folder:
        llfx.save_peft(gm, folder)
        run("load_peft", lambda: llfx.load_peft(model, folder))
    return ran


def main() -> None:
    """Print the figures."""
    lines = lines_by_wing()
    for wing, count in lines.most_common():
        print(f"{wing:16} {count:6}")
    print(f"{'package':16} {lines.total():6}\n")
    for name, ran in ways().items():
        capture = {file for file, _ in ran if "/capture/" in file}
        files = len({file for file, _ in ran})
        print(f"{name:26} {files:4} files {len(ran):5} functions, {len(capture):3} files of capture")
    print(f"\nfiles above 350 lines: {long_files(350)}\nfunctions above 50 lines: {long_functions(50)}")


if __name__ == "__main__":
    main()
