"""Build the site of pages that read as plain files too: their links to the code, their lists, and the reference.

- A link from a page to a file outside of `docs/` leads to a copy of that file on the site, below `source/`.
- A list right after a paragraph is a list, as on GitHub.
- `nav` may name a folder; pages that are not there yet are left out.
- `reference/` has a page for each wing, with all public names that come from it.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCE = "source/"
TEXT = {".cfg", ".js", ".json", ".jsonl", ".py", ".sh", ".toml", ".txt", ".yml", ""}
"""Endings of files that are shown as a page with their text."""

CODE = re.compile(r"^```.*?^```\s*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FIRST_COMMENT = re.compile(r"\A<!--.*?-->\s*", re.DOTALL)
"""Matches what a script writes above a title, because MkDocs finds a title in the first line only."""
TIGHT_LIST = re.compile(r"^(?![-*|#>\s]|\d+\. )(.+)\n(?=(?:- |1\. ))", re.MULTILINE)

TITLES = {
    "rewriting": "Rewrite, merge, combine",
    "hugging_face": "Hugging Face models",
    "torch_compile": "Inside torch.compile",
    "capture": "Comparisons",
    "formats": "Files",
    "hand_over": "Hand it over",
    "inspection": "Look inside",
    "execution": "Run",
    "adapters": "Adapters and your own variants",
    "variants": "Variants",
    "distributed": "Several processes",
    "errors": "Errors",
    "passes": "Passes",
    "testing": "Test your own variant",
}
"""The pages of the reference in their order, by the wing that the names come from."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace folders in the navigation by their pages, and leave out what is not there."""
    config.nav = list(_existing(config.nav or []))
    return config


def _existing(nav: list[Any]) -> Iterator[Any]:
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            yield {title: list(_existing(value))}
        elif not value.endswith("/"):
            if (DOCS / value).exists():
                yield entry
        elif (DOCS / value).is_dir():
            pages = sorted((DOCS / value).glob("*.md"), key=lambda page: (page.name != "README.md", page.name))
            names = [page.name for page in pages if page.name != "path.md"]
            names += [f"{wing}.md" for wing in public_names()] if value == "reference/" else []
            yield {title: [f"{value}{name}" for name in names]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of `docs/` that pages link to, and the pages of the reference."""
    for wing, names in public_names().items():
        content = f"# {TITLES.get(wing, wing)}\n\n" + "\n".join(f"::: {_place(name)}\n" for name in names)
        files.append(File.generated(config, f"reference/{wing}.md", content=content))
    waiting = [DOCS / file.src_uri for file in files.documentation_pages() if (DOCS / file.src_uri).exists()]
    seen: set[Path] = set()
    while waiting:
        page = waiting.pop()
        for target in targets(page):
            if target in seen or target.is_relative_to(DOCS):
                continue
            seen.add(target)
            files.append(_copy(target, config))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def _place(name: str) -> str:
    """Return the place by which mkdocstrings finds a public name: of a name that a wing has too, its module."""
    _, _, last = name.rpartition(".")
    if name == f"lora_lite_fx.{last}" and (ROOT / "lora_lite_fx" / last).is_dir():
        return f"lora_lite_fx.{dict(_imported(ROOT / 'lora_lite_fx' / '__init__.py'))[last]}.{last}"
    return name


def _copy(target: Path, config: MkDocsConfig) -> File:
    uri = site_uri(target)
    if target.is_dir():
        names = sorted(path.name for path in target.iterdir() if not path.name.startswith(("_", ".")))
        return File.generated(config, uri, content=f"# {target.name}/\n\n" + "\n".join(f"- `{name}`" for name in names))
    if target.suffix == ".md":
        return File.generated(config, uri, content=target.read_text(encoding="utf-8"))
    if uri.endswith(".md"):
        language = target.suffix.removeprefix(".").replace("txt", "text").replace("jsonl", "json")
        text = target.read_text(encoding="utf-8")
        name = target.relative_to(ROOT)
        return File.generated(config, uri, content=f"# {name}\n\n````{language}\n{text.rstrip()}\n````\n")
    return File.generated(config, uri, abs_src_path=str(target))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the copies, and lists be lists."""
    real = real_path(page.file.src_uri)
    markdown = FIRST_COMMENT.sub("", markdown)

    def linked(match: re.Match[str]) -> str:
        target = resolved(real, match[1])
        if target is None:
            return match[0]
        path = posixpath.relpath(site_uri(target), posixpath.dirname(page.file.src_uri))
        return f"]({path}{match[2] or ''})"

    return outside_code(markdown, lambda text: TIGHT_LIST.sub(r"\1\n\n", LINK.sub(linked, text)))


def outside_code(markdown: str, change: Any) -> str:
    """Return the text with `change` applied to all but its code."""
    codes: list[str] = []

    def put_away(match: re.Match[str]) -> str:
        codes.append(match[0])
        return f"\x00{len(codes) - 1}\x00"

    return re.sub(r"\x00(\d+)\x00", lambda match: codes[int(match[1])], change(CODE.sub(put_away, markdown)))


def targets(page: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository that a page links to."""
    for match in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        target = resolved(page, match[1])
        if target is not None:
            yield target


def resolved(page: Path, link: str) -> Path | None:
    """Return the file that a link of a page leads to; a folder's README in place of the folder."""
    target = Path(os.path.normpath(page.parent / link))
    if not target.is_relative_to(ROOT) or not target.exists():
        return None
    return target / "README.md" if target.is_dir() and (target / "README.md").exists() else target


def site_uri(target: Path) -> str:
    """Return where a file of the repository is on the site."""
    if target.is_relative_to(DOCS) and target.suffix != ".py":
        return target.relative_to(DOCS).as_posix()
    uri = SOURCE + target.relative_to(ROOT).as_posix()
    return f"{uri}.md" if target.is_dir() or target.suffix in TEXT else uri


def real_path(uri: str) -> Path:
    """Return the file of the repository whose page this is."""
    return ROOT / uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else DOCS / uri


def public_names() -> dict[str, list[str]]:
    """Return the public names of the package by the wing that defines them, as its `__init__.py` imports them."""
    package = ROOT / "lora_lite_fx"
    by_wing: dict[str, list[str]] = {}
    origin = dict(_imported(package / "__init__.py"))
    for name in _exported(package / "__init__.py"):
        by_wing.setdefault(origin[name].partition(".")[0], []).append(f"lora_lite_fx.{name}")
    by_wing["passes"] = [f"lora_lite_fx.passes.{name}" for name in _exported(ROOT / "passes" / "__init__.py")]
    by_wing["testing"] = [f"lora_lite_fx.testing.{name}" for name in _exported(package / "testing" / "__init__.py")]
    order = [*TITLES, *by_wing]
    return {wing: by_wing[wing] for wing in sorted(by_wing, key=order.index)}


def _imported(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each name that a package imports from a module of its own, with the module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, node.module


def _exported(file: Path) -> list[str]:
    """Return the value of `__all__` in a file."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    raise ValueError(f"{file} has no __all__")
