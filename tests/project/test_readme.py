"""The Python code of README.md, CONTRIBUTING.md and the wings' READMEs runs as written, and their links work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_lite_fx.adapters.registry import _REGISTRY, registry
from tests.support.selection import broad_unless

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FOLDERS = ("lora_lite_fx", "passes", "tests", "examples", "docs", ".github")
# The link lora_lite_fx/passes is not followed, so that each page is found once.
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def blocks(page: Path, language: str) -> list[str]:
    """Return the code of the page's blocks in the language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    """Return the page's name as a test's id."""
    return str(page.relative_to(ROOT))


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links in the page's text that lead to no file or heading of the repository."""
    targets = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text)
    broken = []
    for path, anchor in targets:
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    return broken


def anchors(page: Path) -> set[str]:
    """Return the names by which links reach the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Forget after a test the variants that it registered."""
    before = registry()
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    "page",
    broad_unless(lambda page: page != README, [page for page in PAGES if blocks(page, "python")]),
    ids=named,
)
def test_the_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), namespace)
    if page == README:
        assert (tmp_path / "adapter.safetensors").exists()


def test_pages_with_python_are_found() -> None:
    with_python = {named(page) for page in PAGES if blocks(page, "python")}
    assert with_python >= {"README.md", "CONTRIBUTING.md", "lora_lite_fx/variants/README.md"}
    assert "lora_lite_fx/variants/YOUR_OWN.md" in with_python
    assert len(blocks(README, "python")) >= 5


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](nothing.md), [b](#nowhere), [c](README.md#limits), [d](passes), [e](https://example.org/x)"
    assert broken_links(README, text) == ["nothing.md#", "#nowhere"]


def test_the_quickstart_has_ten_lines_at_most() -> None:
    assert len([line for line in blocks(README, "python")[0].splitlines() if line.strip()]) <= 10


def test_every_variant_is_in_the_table() -> None:
    for name, cls in registry().items():
        if cls.__module__.startswith("lora_lite_fx."):
            # arXiv, or for HiRA, which is not there, OpenReview.
            assert f"[`{name}`](https://" in README.read_text(encoding="utf-8")
