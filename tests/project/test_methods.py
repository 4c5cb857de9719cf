"""Each variant has a page in docs/methods, which says what the code says now."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from tests.support.scripts import script
from tests.support.selection import TYPICAL, slow_after

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"


@pytest.fixture(scope="module")
def make_methods() -> ModuleType:
    """The script that writes the pages, which belongs to no package."""
    return script(ROOT / "docs" / "make_methods.py")


def test_every_variant_has_a_page_a_picture_and_a_row(make_methods: ModuleType) -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    stems = {make_methods.stem(cls): name for name, cls in make_methods.variants().items()}
    assert {page.stem for page in PAGES.glob("*.md")} - {"README", "path"} == set(stems)
    assert {picture.stem for picture in (PAGES / "images").glob("*.svg")} == set(stems)
    for stem, name in stems.items():
        assert f"| [`{name}`]({stem}.md) |" in index
    assert f"## All {len(stems)} variants" in index


def test_every_page_has_all_parts() -> None:
    parts = ["When to use it", "What it costs", "Options", "Use it", "Files and hand-over"]
    for page in PAGES.glob("*.md"):
        if page.stem not in ("README", "path"):
            text = page.read_text(encoding="utf-8")
            assert re.findall(r"^## (.*)$", text, re.MULTILINE) == parts, page
            assert "**Paper:**" in text


def test_the_pictures_are_well_formed_and_need_nothing_else() -> None:
    for picture in (PAGES / "images").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "prefers-color-scheme: dark" in text
        assert not re.search(r"https?://(?!www\.w3\.org)|@import|url\((?!#)", text)


def test_the_counted_costs_are_of_every_variant_for_linears(make_methods: ModuleType) -> None:
    # Full trains what it adapts; vectors of VBLoRA do not divide the widths of the model; TrainableTokens needs tokens.
    assert set(make_methods.counted_costs()) == set(make_methods.variants()) - {"Full", "VBLoRA", "TrainableTokens"}


@pytest.mark.broad
@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="other releases capture some variants with other operators"
)
@pytest.mark.parametrize("chosen", slow_after(1, [sorted(TYPICAL), []]), ids=["some", "all"])
def test_the_pages_are_what_the_script_writes(
    chosen: list[str], make_methods: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_methods.py", "--check", *chosen])
    assert make_methods.main() == 0, capsys.readouterr().out
