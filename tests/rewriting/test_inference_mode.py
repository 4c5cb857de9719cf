"""Adapters that are made inside `torch.inference_mode` train outside of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.models import one_layer_llama
from tests.support.selection import broad_after


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x).relu())
        return y


def net() -> nn.Module:
    return Net()


X = torch.randn(3, 8)
LORA = llfx.LoRA(r=2, target_names=".")
STARTS: dict[str, Any] = {
    "rewrite": lambda path: llfx.rewrite(net(), LORA),
    "rewrite, exported": lambda path: llfx.rewrite(net(), LORA, (torch.randn(3, 8),)),
    "rewrite of a capture": lambda path: llfx.rewrite(llfx.capture(net()), LORA),
    "wrap": lambda path: llfx.wrap(net(), LORA),
    "load": lambda path: llfx.load(net(), path / "own"),
    "load_peft": lambda path: llfx.load_peft(net(), path / "peft"),
    "remove": lambda path: llfx.rewrite(llfx.remove(llfx.rewrite(net(), LORA)), LORA),
    "merge": lambda path: llfx.rewrite(llfx.merge(llfx.rewrite(net(), LORA)), LORA),
    "calibration": lambda path: llfx.rewrite(
        net(), llfx.EVA(r=2, target_names="."), (torch.randn(3, 8),), calibration=[(torch.randn(9, 8),)]
    ),
}


@pytest.mark.parametrize("what", broad_after(4, STARTS))
def test_what_is_made_in_inference_mode_trains(what: str, tmp_path: Path) -> None:
    saved = llfx.rewrite(net(), LORA)
    llfx.save(saved, tmp_path / "own")
    llfx.save_peft(saved, tmp_path / "peft")
    base = net()  # the frozen weights are ordinary tensors, as of a model that was loaded before
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "net", lambda: base)
        gm = STARTS[what](tmp_path)
        assert torch.is_inference_mode_enabled()
        assert not any(parameter.is_inference() for parameter in llfx.adapter_parameters(gm))
    gm(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in llfx.adapter_parameters(gm))


@pytest.mark.broad
def test_an_adapted_model_that_is_made_and_called_in_inference_mode_trains() -> None:
    model = one_layer_llama()
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        adapted = llfx.adapt(model, llfx.LoRA(r=2, target_names="q_proj"))
        adapted.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in llfx.adapter_parameters(adapted))
