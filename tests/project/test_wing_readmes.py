"""The README of each wing: it names files that exist, and the wings that the layers test allows it to import."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project.test_layers import FLOOR, NAME, ROOT

PASSES = ROOT / "passes"
READMES = sorted((ROOT / NAME).glob("*/README.md"))
MAY_IMPORT = re.compile(r"^\*\*May import:\*\*([^.]*)\.", re.MULTILINE)


def named_files(text: str) -> list[str]:
    """Return the Python files that `text` names between backticks."""
    return re.findall(r"`([\w/.]+\.py)`", text)


def missing_files(readme: Path) -> list[str]:
    """Return the files that a README names and that neither its wing, nor the package, nor the passes have."""
    folders = [readme.parent, ROOT / NAME, *(PASSES / family for family in ("normalize", "adaptation", "optimize"))]
    names = named_files(readme.read_text(encoding="utf-8"))
    return [name for name in names if not any((folder / name).exists() for folder in folders)]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_readme_names_files_that_exist_and_fits_a_page(readme: Path) -> None:
    assert missing_files(readme) == []
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 50


WINGS = ["torch_compile", "ops", "storage", "capture", "sites", "adapters", "rewriting", "hugging_face"]
WINGS += ["compat", "graph", "passes", "execution", "distributed", "inspection", "testing"]


@pytest.mark.parametrize("wing", WINGS)
def test_a_readme_names_exactly_the_wings_below(wing: str) -> None:
    match = MAY_IMPORT.search((ROOT / NAME / wing / "README.md").read_text(encoding="utf-8"))
    assert match, "there is no line '**May import:** `graph`, `errors`.'"
    below = {other for other, floor in FLOOR.items() if floor < FLOOR[wing]}
    folders = {other for other in below if (ROOT / NAME / other).is_dir()}
    named = set(re.findall(r"`(\w+)`", match[1]))
    assert folders <= named <= below


def test_a_file_that_does_not_exist_is_found(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("Start in `here.py`, then `gone.py`.\n")
    (tmp_path / "here.py").touch()
    assert missing_files(readme) == ["gone.py"]
