"""What transformers computes without autocast is computed so by a graph that was captured without autocast."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.quirks.autocast_regions import REPLACED, autocast_regions_kept, makes_regions


class Angles(nn.Module):
    """Multiplies in full precision also under autocast, as models of transformers compute angles of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with sys.modules[type(self).__module__].maybe_autocast(x.device.type, enabled=False):
            angles = (1000 * x) @ x.mT
        y: Tensor = angles.cos() + self.first(x).sum(-1, keepdim=True)
        return y


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Angles:
    from transformers.utils import generic

    file = ModuleType("modeling_of_a_test")
    vars(file)[REPLACED] = vars(generic)[REPLACED]  # which notices when a release has none
    monkeypatch.setitem(sys.modules, file.__name__, file)
    kind: Any = type("Angles", (Angles,), {"__module__": file.__name__})
    torch.manual_seed(0)
    built: Angles = kind()
    return built


def test_a_region_without_autocast_stays_one(model: Angles) -> None:
    x = torch.randn(2, 5, 8)
    gm = llfx.capture(model, (torch.randn(2, 4, 8),))
    assert (gm(x) - model(x)).abs().max() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (gm(x) - model(x)).abs().max() == 0
        outside = ((1000 * x) @ x.mT).cos() + model.first(x).sum(-1, keepdim=True)
        assert (outside - model(x)).abs().max() > 0.1


def test_the_files_of_models_are_left_as_they_were_and_other_threads_are_left_alone(model: nn.Module) -> None:
    file = sys.modules[type(model).__module__]
    before = vars(file)[REPLACED]
    regions: list[object] = []
    assert makes_regions(model, None)
    with autocast_regions_kept(model, ((), {})):
        assert isinstance(vars(file)[REPLACED]("cpu", enabled=False), torch.autocast)
        thread = threading.Thread(target=lambda: regions.append(vars(file)[REPLACED]("cpu", enabled=False)))
        thread.start()
        thread.join()
    assert not isinstance(regions[0], torch.autocast)
    assert vars(file)[REPLACED] is before


def test_a_model_that_asks_for_no_such_region_is_left_alone() -> None:
    assert not makes_regions(nn.Sequential(nn.Linear(2, 2), Angles()), None)
