"""Fixtures for passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_lite_fx.passes import pipeline


@pytest.fixture(scope="package", autouse=True)
def lint_after_each_pass() -> Iterator[None]:
    """Lint after the passes of this library too, after which a pipeline lints once, at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "is_of_others", lambda graph_pass: True)
        yield
