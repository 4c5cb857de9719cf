"""Check models whose loss no graph computes: each adapter acts in a call with labels, or the call is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise

X, LABELS = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4])


class AroundConfig(PretrainedConfig):
    model_type = "around"


@dataclass
class Scored(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class Around(PreTrainedModel):
    """A linear and attention that reads the weight of its last linear, with a loss that numpy decides on."""

    config_class = AroundConfig
    main_input_name = "x"

    def __init__(self, config: AroundConfig) -> None:
        super().__init__(config)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, labels: Tensor | None = None, return_dict: bool | None = None) -> Any:
        y = self.first(x)
        logits = self.head(y + self.attention(y, y, y, need_weights=False)[0])
        if labels is None:
            return Scored(logits=logits)
        lengths = numpy.asarray(labels.detach())
        losses = [row[:length].square().mean() for row, length in zip(logits, lengths, strict=True)]
        return Scored(torch.stack(losses).sum(), logits)


def adapted(*names: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Around(AroundConfig())
    return llfx.adapt(model.eval(), llfx.LoRA(r=2, target_names=names), example_inputs={"x": X})


def test_an_adapter_in_a_module_that_is_called_acts_in_a_call_with_labels() -> None:
    model = adapted("first", "head")
    model(x=X, labels=LABELS)
    randomise(model, 0)
    outputs = model(x=X, labels=LABELS)
    close(outputs.logits, model(x=X).logits, 1e-5, "logits")
    assert outputs.loss > 0


@pytest.mark.broad
def test_an_adapter_whose_module_is_read_and_not_called_is_seen_at_the_start() -> None:
    model = adapted("first", "out_proj")
    before = llfx.adapter_state_dict(model)
    with pytest.raises(llfx.CaptureError, match="numpy"):
        model(x=X, labels=LABELS)
    for name, tensor in llfx.adapter_state_dict(model).items():
        assert torch.equal(tensor, before[name]), name
