"""Every variant on quantized bases: the conformance suite, with a storage and a config that are drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lora_lite_fx as llfx
from lora_lite_fx.testing import check
from tests.support.conformance import configs, representatives
from tests.support.models import Attention, GatedMLP, Net, ids
from tests.support.quantized import installed, quantized
from tests.support.selection import broad_after

VARIANTS = list(representatives().values())


def check_on(storage: str, cls: type[llfx.Variant], data: st.DataObject) -> None:
    torch.manual_seed(0)
    model = quantized(storage, Net([Attention, GatedMLP], True, False, 32, 64).eval())
    exported = data.draw(st.booleans())
    cfg = data.draw(configs(cls, target_names=("blocks",)))
    inputs = (ids(3, 4, seed=1),)
    check(cfg, model, (ids(2, 5),) if exported else None, inputs, start=None, skip=("stacks", "seed"))


@pytest.mark.broad
@settings(max_examples=1, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(st.sampled_from(installed()), st.sampled_from(VARIANTS), st.data())
def test_a_variant_conforms_on_a_quantized_base(storage: str, cls: type[llfx.Variant], data: st.DataObject) -> None:
    check_on(storage, cls, data)


@pytest.mark.slow
@pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
@settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(st.sampled_from(installed()), st.data())
def test_every_variant_conforms_on_quantized_bases(cls: type[llfx.Variant], storage: str, data: st.DataObject) -> None:
    check_on(storage, cls, data)


@pytest.mark.parametrize("cls", broad_after(1, [llfx.Full, llfx.DoRA]))
def test_variants_that_read_or_replace_the_weight_see_the_dense_one(cls: type[llfx.Variant]) -> None:
    model = quantized("nf4 twice", Net([GatedMLP], True, False, 32, 64).eval())
    fields: dict[str, Any] = {} if cls is llfx.Full else {"r": 2}
    skip = ("stacks", "seed", "export", "positions", "result", "file", "reached")
    check(cls(target_names=("up",), **fields), model, None, (ids(3, 4),), start=None, skip=skip)
