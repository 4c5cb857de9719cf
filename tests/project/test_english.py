"""The English of README, docs, public docstrings and messages: short sentences, and none of the bad turns below.

One reader (who knows PyTorch) and one voice. Readers stumbled over these turns. Patterns see what is checked here;
CONTRIBUTING.md has the rest.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_lite_fx
import lora_lite_fx.testing

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
WORDS, WORDS_OF_DOCSTRINGS = 30, 40

TURNS = {
    r"\ba training\b(?! (?:step|call|set|run|loop|script|program|forward|graph|batch|mode))": "training",
    r"\b(?:is|are|was|be) warned of\b": "raises a warning",
    r"\bone's own\b": "your own",
    r"(?:^|(?<=[.;:] ))What (?:is|are)\b(?![^.?]*\?)": "name the subject: 'the graph', 'the adapter'",
    r"(?<!there )(?<!There )\b(?:is|are) no (?!longer|more|such)": "is not a",
    r"\btake (?:LoRA|DoRA|the (?:graph|model)) (?:for|where|if)\b": "use",
}


def prose(page: Path) -> str:
    """Return the text of a page without code, tables, headings and addresses; a paragraph or an item is one line."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?:\||#|    |!\[).*$", "", text, flags=re.MULTILINE)
    return joined(text)


def joined(text: str) -> str:
    """Return text whose paragraphs and items are one line each, and whose code is one word."""
    text = re.sub(r"``.*?``|`[^`]*`", "code", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<?https?://[^\s>)]+>?", "address", text)
    text = re.sub(r"\n(?=\s*(?:[-*]|\d+\.) )", "\n\n", text)
    text = re.sub(r"(?:[\w.+-]+(?: [\w.+-]+)?,\s+){4,}", "list, ", text)  # four names and more are one word
    return "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of joined text. A colon or a semicolon ends none."""
    for line in text.splitlines():
        yield from filter(None, re.split(r"(?<=[.?!])(?<!e\.g\.)(?<!i\.e\.)[*)]* +", line))


def faults(text: str, most: int) -> list[str]:
    """Return what is wrong with joined text: sentences that are too long, and turns, with what to write."""
    counted = [(len(re.findall(r"[\w'-]+", sentence)), sentence) for sentence in sentences(text)]
    found = [f"{words} words: {sentence}" for words, sentence in counted if words > most]
    for pattern, better in TURNS.items():
        for match in re.finditer(pattern, text, re.MULTILINE):
            found.append(
                f"{match[0]!r}, better {better!r}: ...{text[max(0, match.start() - 40) : match.end() + 40]}..."
            )
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_reads_well(page: Path) -> None:
    assert faults(prose(page), WORDS) == []


def docstrings() -> dict[str, str]:
    """Return the docstrings of the public functions and classes, by name."""
    public = [(module, name) for module in (lora_lite_fx, lora_lite_fx.testing) for name in module.__all__]
    return {name: inspect.getdoc(getattr(module, name)) or "" for module, name in public}


@pytest.mark.parametrize("name", docstrings())
def test_a_public_docstring_reads_well(name: str) -> None:
    text = re.sub(
        r"^(Args|Returns|Raises|Yields):$|^    (\w+(?:, \w+)*): ", "\n\n", docstrings()[name], flags=re.MULTILINE
    )
    text = re.sub(r"^ {4,}>>>.*$|^ {8,}\S.*::$", "", text, flags=re.MULTILINE)
    assert faults(joined(text), WORDS_OF_DOCSTRINGS) == []


def said(node: ast.AST) -> str:
    """Return the text of a message, with one word for each value that is formatted in; empty if it is not a literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp):
        return said(node.left) + said(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) or "value" for part in node.values)
    return ""


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the messages of the errors and warnings that a file raises, with their lines."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args:
            is_warning = isinstance(call.func, ast.Attribute) and call.func.attr == "warn"
            if isinstance(node, ast.Raise) or is_warning:
                yield call.lineno, said(call.args[0])


def test_messages_read_well() -> None:
    files = [file for folder in ("lora_lite_fx", "passes") for file in (ROOT / folder).rglob("*.py")]
    found = {file: list(messages(file)) for file in files}
    assert sum(map(len, found.values())) > 600
    wrong = [
        f"{file}:{line}: {fault}"
        for file, several in found.items()
        for line, text in several
        for fault in faults(joined(text), WORDS)
    ]
    assert wrong == []


def test_a_message_that_reads_badly_is_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text('raise ValueError(f"{name} is warned of " "here.")\n')
    assert [faults(joined(text), WORDS) for _, text in messages(file)] != [[]]


def test_faults_are_found() -> None:
    assert (
        len(faults("After a training one is warned of it. What is saved is here. It is no list of one's own.", 30)) == 5
    )
    assert faults("word " * 31 + ".", 30)
    assert faults("A training step ends. What is a site? It is no longer here. `code` is one word.", 30) == []
