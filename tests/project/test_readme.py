"""The Python code of the README, the docs and the wings' READMEs runs as written, their links work, counts are true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_lite_fx.adapters.registry import _REGISTRY, registry
from tests.survey.__main__ import RESULTS as SURVEY
from tests.survey.__main__ import read
from tests.survey.table import paths

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FOLDERS = ("lora_lite_fx", "passes", "tests", "examples", "docs", ".github")
# The link lora_lite_fx/passes is not followed, so that each page is found once.
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
RESULTS = ROOT / "examples/results"


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
@pytest.mark.broad
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_the_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    if any("from torchao" in block for block in blocks(page, "python")):
        pytest.importorskip("torchao")
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), namespace)
    if page == README:
        assert (tmp_path / "adapter.safetensors").exists()


def test_pages_with_python_are_found() -> None:
    with_python = {named(page) for page in PAGES if blocks(page, "python")}
    assert with_python >= {"README.md", "CONTRIBUTING.md", "lora_lite_fx/variants/README.md", "docs/from_peft.md"}
    assert with_python >= {named(page) for page in (ROOT / "docs/ladder").glob("*.md")} - WITHOUT_CODE
    assert len(blocks(README, "python")) >= 3


WITHOUT_CODE = {"docs/ladder/README.md", "docs/ladder/several_processes.md"}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](nothing.md), [b](#nowhere), [c](README.md#limits), [d](passes), [e](https://example.org/x)"
    assert broken_links(README, text) == ["nothing.md#", "#nowhere"]


def test_the_quickstart_has_ten_lines_at_most() -> None:
    assert len([line for line in blocks(README, "python")[0].splitlines() if line.strip()]) <= 10


def built_in() -> set[str]:
    """Return the names of the variants of this package."""
    return {name for name, cls in registry().items() if cls.__module__.startswith("lora_lite_fx.")}


def test_the_readme_is_read_in_five_minutes() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len(text.splitlines()) <= 150


def test_the_readme_counts_variants() -> None:
    text = README.read_text(encoding="utf-8")
    assert f"another of {len(built_in())} methods" in text
    assert f"[All {len(built_in())}, with formulas and costs]" in text
    table = text.partition("## Variants")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == 6


def ratios(file: str, case: str, measure: str, variant: str) -> dict[str, float]:
    """Return one result of a committed file, as multiples of the base (of runs in pairs in `cpu-frozen`); or counts."""
    results = json.loads((RESULTS / file).read_text())["results"]
    (result,) = (r for r in results if (r["case"], r["measure"], r["variant"]) == (case, measure, variant))
    if file == "cpu-frozen.json":
        return {name: paired[0] for name, paired in result["paired"].items()}
    return dict(result["ratios"] or result["values"])


FIGURES = {
    "plain LoRA, large batches": ("cpu-training.json", "smollm2-6", "train-8192", "LoRA", "ours"),
    "DoRA": ("cpu-frozen.json", "smollm2-6", "decode", "DoRA", "ours-frozen"),
    "HRA": ("cpu.json", "smollm2-6", "train", "HRA", "ours"),
    "OFT": ("cpu.json", "smollm2-6", "decode", "OFT", "ours"),
    "compile, export": ("cpu.json", "smollm2-6", "graphs", "DoRA", "ours"),
    "save memory": ("cpu.json", "smollm2-6", "saved", "DoRA", "ours"),
}
"""The rows of the README that say when to use this library: the result of each, and what is ours in it."""


@pytest.mark.parametrize("row", FIGURES)
def test_a_figure_of_the_readme_is_a_committed_result(row: str) -> None:
    *place, ours = FIGURES[row]
    values = ratios(*place)
    (line,) = re.findall(rf"^\| {row} \|.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    digits = 0 if place[2] == "graphs" else 2
    assert f"{values['peft']:.{digits}f} / {values[ours]:.{digits}f}" in line


def test_the_other_figures_of_the_readme_are_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    oft = ratios("cpu-oft.json", "smollm2-6-body", "train", "OFT")
    assert f"(a training step: {oft['peft']:.2f} / {oft['ours']:.2f})" in text
    waits = (RESULTS / "waits.txt").read_text()
    done = {}
    for arm in ("PEFT", "adapt"):  # in columns: imports, weights, made, first step
        (made, first_step) = re.findall(rf"^{arm} +\S+ +\S+ +(\S+) +(\S+)", waits, re.MULTILINE)[0]
        done[arm] = float(made) + float(first_step)
    assert f"first step is done after {done['PEFT']:.1f} s / {done['adapt']:.1f} s" in text
    bank = (RESULTS / "bank.txt").read_text()
    ours, theirs = (
        re.findall(rf"^  {name} .* ([\d.]+)$", bank, re.MULTILINE)[0] for name in ("bank", "PEFT, mixed batch")
    )
    assert f"a decoded token: {theirs} / {ours} |" in text


def committed(measure: str, variant: str, compiled: bool) -> set[tuple[str, str]]:
    """Return what a cell of the table of results may say: PEFT and ours, by medians or by runs in pairs."""
    cells = set()
    for file in ("cpu.json", "cpu-frozen.json"):
        for result in json.loads((RESULTS / file).read_text())["results"]:
            if (result["case"], result["measure"], result["variant"]) != ("smollm2-6", measure, variant):
                continue
            paired = {name: values[0] for name, values in result["paired"].items()}
            for values in (result["ratios"], paired):
                theirs = values.get("peft-compiled" if compiled else "peft")
                ours = values.get("ours-compiled" if compiled else "ours")
                kept = values.get("ours-frozen-compiled" if compiled else "ours-frozen")
                cells |= {(f"{theirs:.2f}" if theirs else "", f"{value:.2f}") for value in (ours, kept) if value}
    return cells


def test_the_table_of_results_is_what_was_committed() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = text.partition("| | decode | prefill | train | saved |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) == 10
    for number, row in enumerate(rows):
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        variant, compiled = name.split()[-1], number >= 7
        for measure, cell in zip(("decode", "forward", "train", "saved"), cells, strict=True):
            if cell:
                theirs, ours = cell.replace("*", "").split(" / ")
                known = committed(measure, variant, compiled)
                assert ours in {value for _, value in known}, (row, measure)
                if float(theirs) < 10:
                    assert theirs in {value for value, _ in known}, (row, measure)


def test_the_readme_counts_what_works() -> None:
    text = README.read_text(encoding="utf-8")
    rows = [row for file in SURVEY.glob("*.jsonl") for row in read(file)]
    built = [row for row in rows if row.get("built") == "yes"]
    equal = sum(bool(paths(row)) for row in rows)
    assert f"{equal} of {len(built)} architectures" in text
    sites, unknown = (sum(row.get(key) or 0 for row in built) for key in ("sites", "without_role"))
    assert f"known for {100 * (1 - unknown / sites):.1f} % of {sites:,} sites" in text
    trainers = re.findall(r"^\| \w.*? \| (\w+) \|", (ROOT / "tests/hugging_face/trainers.md").read_text(), re.MULTILINE)
    outcomes = [outcome for outcome in trainers if outcome != "outcome"]
    assert f"so do {outcomes.count('equal')} of {len(outcomes)} cases" in text
    cases = (ROOT / "tests/formats/peft/cases.md").read_text(encoding="utf-8")
    counted = re.search(r"^- (\d+) cases of methods that are here: (\d+) equal, (\d+) refused;", cases, re.MULTILINE)
    assert counted
    assert f"{counted[2]} of {counted[1]} files compute the same, {counted[3]} are refused" in text
    page = (ROOT / "docs/from_peft.md").read_text(encoding="utf-8")
    assert f"PEFT's own {counted[1]} test cases of methods that are here,\n[{counted[2]} compute the same]" in page
    table = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert f"| {equal} of {len(built)} equal |" in table
    assert f"| {counted[2]} of {counted[1]} equal, {counted[3]} refused |" in table


def test_the_fields_of_peft_are_told_as_they_are() -> None:
    pytest.importorskip("peft")
    from tests.formats.peft.field_table import field_table

    assert field_table() in (ROOT / "docs/from_peft.md").read_text(encoding="utf-8")
