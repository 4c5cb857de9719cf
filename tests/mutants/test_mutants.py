"""The list of mutants is true to the sources, the tests and its table. `run.py` runs the mutants themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from . import MUTANTS
from .mutant import ROOT, Mutant
from .run import table


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}: {mutant.line[:40]}")
def test_a_mutant_changes_one_place_of_a_file_that_is_still_a_program(mutant: Mutant) -> None:
    assert mutant.occurrences == 1
    changed = mutant.source.replace(mutant.text, mutant.replacement)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(mutant.source))


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}))
def test_the_test_of_a_mutant_exists_and_runs_with_the_mutants(test: str) -> None:
    file, _, function = test.partition("::")
    tests = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found = [each for each in tests if isinstance(each, ast.FunctionDef) and (each.name == function or not function)]
    assert any("pytest.mark.slow" not in map(ast.unparse, each.decorator_list) for each in found)


def test_no_mutant_is_listed_twice() -> None:
    assert len({(mutant.file, mutant.text, mutant.replacement) for mutant in MUTANTS}) == len(MUTANTS)


def test_the_table_is_theirs() -> None:
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert readme.endswith(table()), "python -m tests.mutants.run --write none"
