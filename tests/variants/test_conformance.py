"""The conformance suite, over every registered variant and over stacks of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lora_lite_fx as llfx
from lora_lite_fx.testing import check
from lora_lite_fx.testing.properties import PROPERTIES
from tests.support.conformance import configs, for_any_linear, innermost_first
from tests.support.models import Case, cases, ids

TARGETS: tuple[dict[str, Any], ...] = (
    {"target_names": (".",)},
    {"target_names": (".",), "exclude_names": ("head",)},
    {"target_names": (".",), "layers": (0,)},
    {"target_roles": ("reader", "writer", "inner", "head")},
)
VARIANTS = list(for_any_linear().values())

settings.register_profile(
    "conformance",
    deadline=None,
    derandomize=True,
    database=None,
    # Captures take seconds: a failing case is printed as found instead of being shrunk for minutes.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("conformance")

shapes = st.tuples(st.integers(2, 4), st.integers(1, 7))


ELSEWHERE = {"stacks", "seed"}
"""Properties that tests of their own are about."""


def check_on(
    case: Case, cfg: llfx.Variant | list[llfx.Variant], shape: tuple[int, int], skip: Collection[str] = ELSEWHERE
) -> None:
    """Check a config on a random model. What a variant starts from is the matter of tests of its own."""
    inputs = (ids(*shape, seed=case.seed),)
    fixed: dict[str, Any] = {"start": None, "tolerance": case.tolerance, "skip": skip, "seed": case.seed}
    check(cfg, case.build(), case.example_inputs, inputs, **fixed)


def check_random(cls: type[llfx.Variant], data: st.DataObject, skip: Collection[str] = ELSEWHERE) -> None:
    """Check a random config of a variant on a random model."""
    cfg = data.draw(configs(cls, **data.draw(st.sampled_from(TARGETS))))
    check_on(data.draw(cases), cfg, data.draw(shapes), skip)


@pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
@settings(max_examples=1)
@given(data=st.data())
def test_every_variant_conforms_on_random_models(cls: type[llfx.Variant], data: st.DataObject) -> None:
    check_random(cls, data, {*ELSEWHERE, "bfloat16"})


@pytest.mark.broad
@pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
@settings(max_examples=1)
@given(data=st.data())
def test_every_variant_conforms_in_bfloat16(cls: type[llfx.Variant], data: st.DataObject) -> None:
    check_random(cls, data, {has.__name__ for has in PROPERTIES} - {"bfloat16"})


@pytest.mark.slow
@pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
@settings(max_examples=4)
@given(data=st.data())
def test_every_variant_conforms_on_more_random_models(cls: type[llfx.Variant], data: st.DataObject) -> None:
    check_random(cls, data)


@pytest.mark.broad
@settings(max_examples=2)
@given(data=st.data())
def test_stacks_of_variants_conform_on_random_models(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.sampled_from(VARIANTS), min_size=2, max_size=3))
    cfg = [data.draw(configs(cls, **data.draw(st.sampled_from(TARGETS)))) for cls in innermost_first(drawn)]
    check_on(data.draw(cases), cfg, data.draw(shapes))
