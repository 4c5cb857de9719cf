"""The README's code runs as written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_lite_fx.adapters.registry import _REGISTRY, registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = registry()
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.usefixtures("own_registry")
def test_the_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 5
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "adapter.safetensors").exists()


def test_the_quickstart_has_ten_lines_at_most() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_every_variant_is_in_the_table() -> None:
    for name, cls in registry().items():
        if cls.__module__.startswith("lora_lite_fx."):
            assert f"[`{name}`](https://" in README  # arXiv, or for HiRA, which is not there, OpenReview
