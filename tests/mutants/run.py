"""Run the mutants: `python -m tests.mutants.run [WORD]`.

Each mutant is applied to a copy of the repository, and the test that is to notice it runs there and must fail. Without
the mutant it must pass. Results are kept in a file, so that a run that was stopped goes on where it was; a mutant runs
again when its own text, its source file or its test's file have changed. WORD chooses the mutants with it in their file
or test. The command ends with 1 if a mutant survives. `--write` writes the table to `README.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import MUTANTS
from .mutant import ROOT, Mutant

_RESULTS = Path(tempfile.gettempdir()) / "lora_lite_fx_mutants.json"
_COPIED = ("lora_lite_fx", "passes", ".src", "tests", "examples", "pyproject.toml")
_PASSED, _FAILED = 0, 1  # exit codes of pytest
_TABLE_BEGINS = "| file | condition | without it | the test that fails |\n"


def main() -> int:
    """Run the mutants that have no result yet, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.word in f"{mutant.file} {mutant.test}"]
    if options.write:
        write_table()
    results = _killed_before()
    if any(_key(mutant) not in results for mutant in chosen):
        for library in ("hypothesis", "peft", "pytest", "torch", "transformers"):
            importlib.import_module(library)  # once for all forks, because it takes longer than a test
    with tempfile.TemporaryDirectory() as folder:
        copy = _copied_to(Path(folder))
        passing: dict[str, int] = {}
        for mutant in chosen:
            key = _key(mutant)
            if key not in results:
                if mutant.test not in passing:
                    passing[mutant.test] = _run(copy, mutant.test)
                results[key] = _result(copy, mutant) if passing[mutant.test] == _PASSED else "THE TEST FAILS ANYWAY"
                if results[key] == "killed":  # read the file again, because another process may have written to it
                    _RESULTS.write_text(json.dumps({**_killed_before(), key: "killed"}, indent=1))
            print(f"{results[key]:10} {mutant.file}: {mutant.line}", flush=True)
    return int(any(results[_key(mutant)] != "killed" for mutant in chosen))


def _killed_before() -> dict[str, str]:
    results: dict[str, str] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    return results


def write_table() -> None:
    """Write the mutants into the table of `README.md`."""
    readme = Path(__file__).with_name("README.md")
    readme.write_text(readme.read_text(encoding="utf-8").partition(_TABLE_BEGINS)[0] + table(), encoding="utf-8")


def table() -> str:
    """Return the table of all mutants, in Markdown."""
    rows = (_row(mutant) for mutant in MUTANTS)
    return _TABLE_BEGINS + "|---|---|---|---|\n" + "".join(rows)


def _row(mutant: Mutant) -> str:
    file = mutant.file.removeprefix("lora_lite_fx/")
    test = mutant.test.removeprefix("tests/")
    condition = mutant.line.replace("|", "\\|")
    return f"| `{file}` | `{condition}` | {mutant.why} | `{test}` |\n"


def _copied_to(folder: Path) -> Path:
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def _key(mutant: Mutant) -> str:
    test = (ROOT / mutant.test.partition("::")[0]).read_text(encoding="utf-8")
    return hashlib.sha256("\0".join((repr(mutant), mutant.source, test)).encode()).hexdigest()


def _result(copy: Path, mutant: Mutant) -> str:
    file = copy / mutant.file
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(mutant.text, mutant.replacement), encoding="utf-8")
    try:
        code = _run(copy, mutant.test)
    finally:
        file.write_text(original, encoding="utf-8")
    return {_PASSED: "SURVIVED", _FAILED: "killed"}.get(code, f"PYTEST ENDED WITH {code}")


def _run(copy: Path, test: str) -> int:
    """Run a test in a fork of this process, which has imported the large libraries, and return pytest's exit code."""
    pid = os.fork()
    if pid == 0:
        os._exit(_run_here(copy, [test]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run_here(copy: Path, tests: Iterable[str]) -> int:
    import pytest

    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "lora_lite_fx")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy / ".src"), str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.chdir(copy)
    output = os.open(os.devnull if not os.environ.get("MUTANTS_VERBOSE") else "/dev/stderr", os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    everyday_and_broad = ["-m", "not slow"]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *everyday_and_broad, *tests]))


if __name__ == "__main__":
    sys.exit(main())
