"""What capture has to know of transformers models."""

from __future__ import annotations

import pytest

import lora_lite_fx as llfx
from lora_lite_fx.capture.capture_model import origin_of
from tests.support.releases import cases_by_name

CASES = cases_by_name()


@pytest.mark.parametrize(("name", "fixed"), [("sam2", ("pixel_values",)), ("swin", ("pixel_values",)), ("vit", ())])
def test_images_that_are_cut_into_windows_have_one_size(name: str, fixed: tuple[str, ...]) -> None:
    assert origin_of(CASES[name].builder()()).batch_only(made=True) == fixed


@pytest.mark.broad
def test_a_model_that_is_another_one_while_it_is_traced_is_refused_with_the_setting_that_helps() -> None:
    model = CASES["aimv2"].builder()()
    llfx.capture(model)  # with eager attention, as the survey builds it
    model.set_attn_implementation("sdpa")
    with pytest.raises(llfx.CaptureError, match=r'out: call model\.set_attn_implementation\("eager"\) first'):
        llfx.capture(model)
