"""What only newer releases of a library can do: tests of it are skipped on older ones, with the reason."""

from __future__ import annotations

import pytest

from lora_lite_fx.compat.versions import found_version, release


def has(library: str, oldest: str) -> bool:
    """Check whether the installed release of a library is this one or a newer one."""
    return release(found_version(library)) >= release(oldest)


def since(library: str, oldest: str, what: str) -> pytest.MarkDecorator:
    """Mark a test of `what`, a subject with a verb such as "Dory is there", which an older release does not do."""
    reason = f"{what} since {library} {oldest}, and this is {found_version(library)}"
    return pytest.mark.skipif(not has(library, oldest), reason=reason)
