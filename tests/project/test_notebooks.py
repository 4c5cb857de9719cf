"""The notebooks in examples/notebooks run, and hold the outputs that the gallery shows."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.scripts import script

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """The script beside the notebooks that runs them."""
    pytest.importorskip("matplotlib", reason="the notebooks draw with matplotlib")
    return script(ROOT / "examples" / "notebooks" / "run.py", "run_notebooks")


def printed(cell: dict[str, Any]) -> list[str]:
    """Return what a cell printed, as far as it says that something holds."""
    lines = [line for output in cell["outputs"] for line in output.get("text", [])]
    return [line for line in lines if line.rstrip().endswith(("True", "False"))]


@pytest.mark.broad
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_it_said(path: Path, runner: ModuleType) -> None:
    kept, again = (json.loads(path.read_text(encoding="utf-8")) for _ in range(2))
    figures = runner.run(again)
    assert figures
    for old, new in zip(runner.code_cells(kept), runner.code_cells(again), strict=True):
        assert printed(new) == printed(old)
        assert not any(line.rstrip().endswith("False") for line in printed(new))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_outputs_and_the_gallery_its_figures(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, 1))
    figures = [o["data"]["image/png"] for cell in cells for o in cell["outputs"] if o["output_type"] == "display_data"]
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert f"examples/notebooks/{path.name}" in gallery
    for number, figure in enumerate(figures, 1):
        assert f"pictures/{path.stem}-{number}.png" in gallery
        assert (PICTURES / f"{path.stem}-{number}.png").read_bytes() == base64.b64decode(figure)


def test_the_three_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["coming_from_peft", "first_adapter", "many_adapters"]
