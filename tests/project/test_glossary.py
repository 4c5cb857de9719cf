"""The glossary: the files that it names exist, and define what it says they define."""

from __future__ import annotations

import re

import pytest

from tests.project.test_layers import NAME, ROOT

ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (?:`([^`]+)`)? ?\|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
DEFINED = [(word, text, file) for word, text, file in ROWS if file]


def test_it_has_the_words_that_the_code_is_about() -> None:
    words = {word for words, _, _ in ROWS for word in words.split(", ")}
    assert words >= {
        "adapter",
        "variant",
        "site",
        "kind",
        "role",
        "base",
        "placement",
        "insertion",
        "program",
        "capture",
    }
    assert words >= {"quirk", "storage", "dialect", "bank", "slot", "fragment", "pass", "pipeline"}


@pytest.mark.parametrize(("word", "text", "file"), DEFINED, ids=[word for word, _, _ in DEFINED])
def test_a_file_that_it_names_defines_the_word(word: str, text: str, file: str) -> None:
    source = (ROOT / NAME / file).read_text(encoding="utf-8")
    for name in re.findall(r": `(\w+)`\.|: `(\w+)` knows them", text):
        defined = name[0] or name[1]
        assert re.search(rf"^(?:class|def) {defined}\b", source, re.MULTILINE), f"{file} does not define {defined}"
