"""The conformance suite, over every registered variant and over stacks of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site
from tests.support.conformance import check_conformance, configs
from tests.support.models import Case, GatedMLP, ResidualMLP, cases, ids

TARGETS: tuple[dict[str, Any], ...] = (
    {"target_names": (".",)},
    {"target_names": (".",), "exclude_names": ("head",)},
    {"target_names": (".",), "layers": (0,)},
    {"target_roles": ("reader", "writer", "inner", "head")},
)
VARIANTS = list(llfx.registry().values())

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


@pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
@settings(max_examples=5)
@given(data=st.data())
def test_every_variant_conforms_on_random_models(cls: type[llfx.Variant], data: st.DataObject) -> None:
    cfg = data.draw(configs(cls, **data.draw(st.sampled_from(TARGETS))))
    case = data.draw(cases)
    check_conformance(cfg, case, (ids(*data.draw(shapes), seed=case.seed),))


@settings(max_examples=10)
@given(data=st.data())
def test_stacks_of_variants_conform_on_random_models(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.sampled_from(VARIANTS), min_size=2, max_size=3))
    cfg = [data.draw(configs(cls, **data.draw(st.sampled_from(TARGETS)))) for cls in drawn]
    case = data.draw(cases)
    check_conformance(cfg, case, (ids(*data.draw(shapes), seed=case.seed),))


# The suite itself, on variants that must not pass.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(llfx.LoRA):
    """Not registered: each subclass breaks one rule."""

    target_names: tuple[str, ...] | None = (".",)


class ReadsTheMode(Broken):
    """The graph is traced, so a decision taken in Python while tracing is frozen into it."""

    calls = 0

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        ReadsTheMode.calls += 1
        return super().forward(x, base, p) * (1 + ReadsTheMode.calls)


class NotAffine(Broken):
    """Cannot be merged."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return super().forward(x, base, p).square()


class DeadParameter(Broken):
    """Has a parameter that nothing reads."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {**super().params(site), "lora_dead": llfx.ParamSpec((site.d_out,))}


class LosesGradient(Broken):
    """Detaches one factor."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y: Tensor = base(x) + (x @ p.lora_A.t()).detach() @ p.lora_B.t()
        return y


class WritesTheWeight(Broken):
    """Changes the frozen weight, which is the user's."""

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        weight.mul_(1.5)


@pytest.mark.parametrize("cls", [ReadsTheMode, NotAffine, DeadParameter, LosesGradient, WritesTheWeight])
def test_the_suite_rejects_a_broken_variant(cls: type[Broken], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY, cls.__name__, cls)
    case = Case((GatedMLP, ResidualMLP), True, False, torch.float64, False, 0)
    with pytest.raises((AssertionError, llfx.AdapterError)):
        check_conformance(cls(r=2), case, (ids(3, 4),))


def test_the_suite_accepts_the_variant_that_the_broken_ones_derive_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_REGISTRY, "Broken", Broken)
    case = Case((GatedMLP, ResidualMLP), True, False, torch.float64, False, 0)
    check_conformance(Broken(r=2), case, (ids(3, 4),))
