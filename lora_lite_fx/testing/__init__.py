"""Check a variant of your own: `check` runs the conformance suite that the package's own variants pass.

from lora_lite_fx.testing import check

def test_my_variant():
    check(MyVariant(r=4))
"""

from .conformance import Report, Result, check

__all__ = ["Report", "Result", "check"]
