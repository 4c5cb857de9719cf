"""What only newer releases of a library can do: tests of it are skipped on older ones, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from lora_lite_fx.compat.versions import found_version, release
from tests.survey.cases import cases


def has(library: str, oldest: str) -> bool:
    """Check whether the installed release of a library is this one or a newer one."""
    return release(found_version(library)) >= release(oldest)


def since(library: str, oldest: str, what: str) -> pytest.MarkDecorator:
    """Mark a test of `what`, a subject with a verb such as "Dory is there", which an older release does not do."""
    reason = f"{what} since {library} {oldest}, and this is {found_version(library)}"
    return pytest.mark.skipif(not has(library, oldest), reason=reason)


COMPLETE_SINCE = {
    "canine": "5.20",
    "deepseek_vl_hybrid": "5.20",
    "fuyu": "5.24",
    "gemma4_unified_assistant": "5.20",
    "gemma4_vision": "5.20",
    "modernvbert": "5.24",
    "speech-encoder-decoder": "5.20",
}
"""The releases of transformers since which a type has all that inputs are made of."""


class Cases(dict[str, Any]):
    """Types of models by name; a test of one that this release of transformers does not have is skipped."""

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            pytest.skip(f"transformers {found_version('transformers')} has no {name}")
        if not has("transformers", oldest := COMPLETE_SINCE.get(name, "0")):
            pytest.skip(f"{name} has what its inputs are made of since transformers {oldest}")
        return super().__getitem__(name)


def cases_by_name() -> Cases:
    """Return the types of models that the survey knows."""
    return Cases({case.name: case for case in cases()})
