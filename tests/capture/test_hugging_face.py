"""What capture has to know of transformers models."""

from __future__ import annotations

import pytest

from lora_lite_fx.capture.hugging_face import batch_only_arguments
from tests.survey.cases import cases

CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize(("name", "fixed"), [("sam2", ("pixel_values",)), ("swin", ("pixel_values",)), ("vit", ())])
def test_images_that_are_cut_into_windows_have_one_size(name: str, fixed: tuple[str, ...]) -> None:
    assert batch_only_arguments(CASES[name].builder()()) == fixed
