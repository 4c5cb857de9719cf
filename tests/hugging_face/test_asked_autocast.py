"""A model that asks whether autocast is on: the adapted model has a graph for each answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise


class Asking(hf.BertForSequenceClassification):
    """Computes its logits otherwise under autocast."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        result.logits = result.logits * (3.0 if torch.is_autocast_enabled("cpu") else 2.0)
        return result


@pytest.mark.broad
def test_an_adapted_model_has_a_graph_for_each_answer() -> None:
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = Asking(config)
    model.eval()
    chat = llfx.adapt(model, llfx.LoRA(r=2, target_roles="query"))
    ids = torch.randint(3, 50, (2, 6))
    mask = torch.ones_like(ids)
    wrapped = llfx.wrap(model, llfx.LoRA(r=2, target_roles="query"), {"input_ids": ids, "attention_mask": mask})
    randomise(chat, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(chat))
    for enabled in (False, True, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ours, theirs = (each(input_ids=ids, attention_mask=mask).logits for each in (chat, wrapped))
        close(ours.float(), theirs.float(), 1e-6, f"autocast {enabled}")
    assert chat._graphs.captures == 3, "the first of all, which has labels, and one for each answer"
