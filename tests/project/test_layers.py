"""The architecture: a wing imports only wings below it, nothing imports in a circle, and wings keep their own doors."""

from __future__ import annotations

import ast
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.selection import broad_after, slow_after

ROOT = Path(__file__).resolve().parents[2]
NAME = "lora_lite_fx"

# The lowest row first. A wing imports wings of lower rows only: those of one row do not know each other.
ROWS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "log", "text_table"}),
    frozenset({"compat"}),
    frozenset({"graph"}),
    frozenset({"ops"}),
    frozenset({"storage"}),
    frozenset({"sites", "capture"}),
    frozenset({"adapters"}),
    frozenset({"passes", "variants"}),
    frozenset({"execution"}),
    frozenset({"rewriting", "distributed"}),
    frozenset({"formats"}),
    frozenset({"hugging_face", "torch_compile", "inspection"}),
    frozenset({"testing", "hand_over"}),
    frozenset({"__init__", "__main__"}),
)
FLOOR = {wing: floor for floor, row in enumerate(ROWS) for wing in row}

# A pass knows no other family of passes. One exception: a traced adapter follows the mode as a captured model does.
FAMILIES = frozenset({"normalize", "adaptation", "optimize"})
BETWEEN_FAMILIES = {("passes.adaptation.fragment", "passes.normalize.follow_mode")}


@dataclass(frozen=True)
class Import:
    """One import: where it stands, and the module that it names, without the package's name."""

    importer: str
    line: int
    imported: str

    @property
    def wings(self) -> tuple[str, str]:
        return self.importer.split(".")[0], self.imported.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_files(package: Path) -> dict[str, Path]:
    """The modules of the package by their name in it; the package's own `__init__` goes by that."""
    links = {path.resolve(): path for path in package.iterdir() if path.is_symlink()}  # passes/ stands outside
    folders = [package, *links.values()]
    files = {file for folder in folders for file in folder.rglob("*.py")}
    names = {file: ".".join(file.relative_to(package).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in sorted(names.items())}


def imports_of(package: Path) -> list[Import]:
    """Every import inside the package, at any depth of nesting: in functions and under TYPE_CHECKING too."""
    files = module_files(package)
    return [found for name, file in files.items() for found in _imports_in(name, file, files)]


def _imports_in(name: str, file: Path, files: dict[str, Path]) -> Iterator[Import]:
    here = [] if name == "__init__" else name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == NAME):
            up = here[: len(here) - node.level + 1] if node.level else []
            below = (node.module or "").split(".") if node.module else []
            base = [*up, *(below if node.level else below[1:])]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                imported = full if full in files else ".".join(base) or "__init__"
                yield Import(name, node.lineno, imported)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME:
                    yield Import(name, node.lineno, alias.name.partition(".")[2] or "__init__")


def upward(imports: list[Import]) -> list[str]:
    """The imports of wings that do not stand below."""
    wings = [(found, *found.wings) for found in imports]
    return [str(found) for found, own, other in wings if own != other and not FLOOR[other] < FLOOR[own]]


def between_families(imports: list[Import]) -> list[str]:
    """The imports of one family of passes by another."""
    return [
        str(found)
        for found in imports
        if len(families := _families(found)) == 2
        and families[0] != families[1]
        and (found.importer, found.imported) not in BETWEEN_FAMILIES
    ]


def _families(found: Import) -> list[str]:
    paths = [found.importer.split("."), found.imported.split(".")]
    return [path[1] for path in paths if path[0] == "passes" and len(path) > 2 and path[1] in FAMILIES]


def circles(imports: list[Import]) -> list[str]:
    """The circles of imports, also between modules of one wing; a package's face imports what is in it."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        edges.setdefault(found.importer, set()).add(found.imported)
    circles: list[str] = []
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == "open":
            circles.append(" > ".join((*path[path.index(module) :], module)))
        if module in state:
            return
        state[module] = "open"
        for other in sorted(edges.get(module, ())):
            visit(other, (*path, module))
        state[module] = "done"

    for module in sorted(edges):
        visit(module, ())
    return circles


def private_names_taken(package: Path) -> list[str]:
    """The imports of another module's private names: what two files need is not private."""
    taken = []
    for name, file in module_files(package).items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                taken += [f"{name}:{node.lineno} imports {other}" for other in private]
    return taken


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(ROOT / NAME)


def test_every_module_belongs_to_a_wing() -> None:
    wings = {name.split(".")[0] for name in module_files(ROOT / NAME)}
    assert wings <= FLOOR.keys()


def test_a_wing_imports_only_wings_below_it(imports: list[Import]) -> None:
    assert len(imports) > 300, "the imports were not found"
    assert upward(imports) == []


def test_families_of_passes_do_not_know_each_other(imports: list[Import]) -> None:
    assert between_families(imports) == []


def test_nothing_imports_in_a_circle(imports: list[Import]) -> None:
    assert circles(imports) == []


def test_no_two_files_have_one_name() -> None:
    names = Counter(file.name for file in module_files(ROOT / NAME).values())
    assert [name for name, count in names.items() if count > 1 and name != "__init__.py"] == []


def test_private_names_stay_in_their_module() -> None:
    assert private_names_taken(ROOT / NAME) == []


@pytest.mark.parametrize(
    ("file", "line", "check"),
    broad_after(
        1,
        slow_after(
            5,
            [
                ("graph/tensors.py", "from ..adapters.variant import Variant", upward),
                ("graph/tensors.py", "    from ..adapters import variant", upward),
                ("errors.py", "from . import graph", upward),
                ("capture/shared_copy.py", f"import {NAME}.sites.site", upward),
                ("sites/site.py", f"from {NAME}.capture.shared_copy import shared_copy", upward),
                ("variants/lora.py", "from ..passes import Pipeline", upward),
                ("formats/untrusted_files.py", "from .. import rewrite", upward),
                (
                    "passes/optimize/group_heads.py",
                    "from ..adaptation.insert_adapter import InsertAdapter",
                    between_families,
                ),
                ("graph/tensors.py", "from .writes import written", circles),
                ("adapters/param_spec.py", "from .variant import Variant", circles),
            ],
            several=True,
        ),
        several=True,
    ),
)
def test_a_planted_import_is_found(file: str, line: str, check: object, tmp_path: Path) -> None:
    package = tmp_path / NAME
    shutil.copytree(ROOT / NAME, package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = package / file
    indented = "\n\ndef late() -> None:\n" if line.startswith(" ") else "\n"
    planted.write_text(f"{planted.read_text()}{indented}{line}\n")
    assert callable(check)
    assert check(imports_of(ROOT / NAME)) == []
    wrong = check(imports_of(package))
    assert wrong
    assert all(file.removesuffix(".py").replace("/", ".") in found for found in wrong)


def test_planted_private_names_are_found(tmp_path: Path) -> None:
    package = tmp_path / NAME
    shutil.copytree(ROOT / NAME, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "adapters/state.py").open("a") as file:
        file.write("from .variant import _field_types\n")
    assert [found.partition(":")[0] for found in private_names_taken(package)] == ["adapters.state"]
