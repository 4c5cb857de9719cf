"""The site of docs/: each page is in its navigation, and its reference has all public names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import lora_lite_fx
import lora_lite_fx.passes
import lora_lite_fx.testing
from tests.support.scripts import script

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAVIGATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
ENTRIES = re.findall(r"(\S+\.md|\S+/)$", NAVIGATION, re.MULTILINE)
IS_NO_PAGE = {"methods/path.md"}
"""What `exclude_docs` leaves out: a part of a page that a script puts together."""


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - IS_NO_PAGE
    folders = tuple(entry for entry in ENTRIES if entry.endswith("/"))
    assert [page for page in sorted(pages) if page not in ENTRIES and not page.startswith(folders)] == []


def test_every_extra_is_told_where_it_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    assert extras == set(re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture(scope="module")
def site_hooks() -> ModuleType:
    """The hooks of the site, which belong to no package."""
    pytest.importorskip("mkdocs", reason="MkDocs is not installed")
    return script(DOCS / "site_hooks.py")


def test_the_reference_has_every_public_name(site_hooks: ModuleType) -> None:
    listed = [name for names in site_hooks.public_names().values() for name in names]
    modules = (lora_lite_fx, lora_lite_fx.passes, lora_lite_fx.testing)
    assert sorted(listed) == sorted(f"{module.__name__}.{name}" for module in modules for name in module.__all__)


def test_every_page_of_the_reference_has_a_title(site_hooks: ModuleType) -> None:
    assert set(site_hooks.public_names()) <= set(site_hooks.TITLES)


def test_links_in_code_stay_and_lists_after_a_paragraph_are_lists(site_hooks: ModuleType) -> None:
    text = "A list:\n- `a[0](b.md)`\n- [page](../README.md)\n\n```py\nx[0](README.md)\n- y\n```\n"
    changed = site_hooks.outside_code(text, lambda part: site_hooks.TIGHT_LIST.sub(r"\1\n\n", part))
    assert changed == text.replace("A list:\n", "A list:\n\n")


def test_files_outside_of_the_docs_are_copied_to_the_site(site_hooks: ModuleType) -> None:
    page = DOCS / "results.md"
    targets = {target.relative_to(ROOT).as_posix() for target in site_hooks.targets(page)}
    assert "examples/results/cpu.txt" in targets
    assert site_hooks.site_uri(ROOT / "examples/results/cpu.txt") == "source/examples/results/cpu.txt.md"
    assert site_hooks.site_uri(ROOT / "docs/limits.md") == "limits.md"
    assert site_hooks.site_uri(ROOT / "examples/results/cpu.png") == "source/examples/results/cpu.png"
