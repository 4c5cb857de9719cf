"""The paths of the survey beside the default capture: inputs of a user, the part of a model, and the backend."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.releases import cases_by_name
from tests.support.selection import broad_after
from tests.survey import by_backend
from tests.survey.by_backend import compare_by_backend
from tests.survey.comparing import NotApplicable, Unequal
from tests.survey.table import paths
from tests.survey.trial import PATHS, try_model
from tests.survey.tried import Tried
from tests.survey.user_inputs import USER_INPUTS

CASES = cases_by_name()


def outcome(name: str, *steps: str) -> dict[str, Any]:
    known: dict[str, Any] = {}
    try_model(CASES[name].builder(), steps, known.update)
    return known


class Branches(nn.Module):
    """A model that decides by values, which no single graph does."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.survey_calls = {"example": {"x": self.drawn(5)}, "other batch": {"x": self.drawn(3)}}

    def drawn(self, batch: int) -> Tensor:
        return torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.up(self.norm(x))
        return {"y": self.down(x.relu() if x.sum().item() > 0 else x)}


def branches() -> nn.Module:
    torch.manual_seed(0)
    return Branches()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_a_model_that_decides_by_values_is_equal_by_the_backend() -> None:
    known: dict[str, Any] = {}
    compare_by_backend(Tried(branches, given=True), known.update)
    assert known["backend_graphs"] >= 2
    assert "backend_excluded" not in known


def test_a_difference_of_the_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_backend, "_add", lambda down, up, module, args, output: output + args[0] @ down.T @ up.T)
    with pytest.raises(Unequal, match=r"example, training: \['y'\] is"):
        compare_by_backend(Tried(branches, given=True), lambda **known: None)


def test_a_model_that_torch_compile_does_not_take_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(**inputs: Tensor) -> Any:
        raise ValueError("not compiled")

    monkeypatch.setattr(torch, "compile", lambda model, **settings: compiled)
    with pytest.raises(NotApplicable, match=r"torch\.compile of it raises ValueError: not compiled"):
        compare_by_backend(Tried(branches, given=True), lambda **known: None)


def test_a_model_is_equal_by_the_paths_that_ended_so() -> None:
    ends = {"built": "yes", "default": "refused: why", "inputs": "none: why", "part": "yes", "backend": "yes"}
    assert paths(ends) == ["part", "backend"]
    assert paths({**ends, "built": "error: why"}) == []
    assert [*PATHS] == ["default", "inputs", "part", "backend"]


@pytest.mark.parametrize("name", broad_after(4, USER_INPUTS))
def test_a_model_takes_the_inputs_of_a_user_in_both_modes(name: str) -> None:
    if name == "omdet-turbo":
        pytest.importorskip("timm")  # has its backbone
    model = CASES[name].builder()()
    sizes = set()
    for inputs in model.survey_calls.values():
        for training in (True, False):
            torch.manual_seed(0)
            assert dict(model.train(training)(**inputs))
        sizes.add(str([value.shape for value in inputs.values() if isinstance(value, Tensor)]))
    assert len(sizes) == len(model.survey_calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "refusal"),
    [
        ("bark", "part", r"refused: .* no forward\(\).*such as model\.semantic\."),
        ("seggpt", "inputs", r"refused: .* It requires prompt_pixel_values, prompt_masks\..*pass example_inputs"),
        ("ibert", "backend", r"differs: .* in training: buffer .*(?s:.*)lora_lite_fx\.backend\(cfg\)\.adapt"),
    ],
)
def test_a_model_that_is_refused_is_equal_by_the_path_that_the_error_names(name: str, path: str, refusal: str) -> None:
    known = outcome(name, "default", path)
    assert re.match(refusal, known["default"])
    assert known[path] == "yes"
