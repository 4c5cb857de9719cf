"""`LeaveOutInputs`: constants in the place of inputs, and only the results that the model returns without them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.capture.signature import CallSignature
from lora_lite_fx.execution.optimize import execution_of
from lora_lite_fx.graph.copies import copy_graph
from lora_lite_fx.passes import LeaveOutInputs, Pipeline

aten = torch.ops.aten


class Masked(nn.Module):
    """A linear with a mask and a loss, both optional."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.fc(x if mask is None else x * mask[..., None])
        result = {"logits": logits}
        if labels is not None:
            result = {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), **result}
        return result


X = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
INPUTS = {"x": X, "mask": torch.ones(3, 7), "labels": torch.ones(3, 7, dtype=torch.long)}


def captured() -> tuple[nn.Module, fx.GraphModule, CallSignature]:
    model = Masked()
    graph = llfx.capture(model, copy.copy(INPUTS))
    signature = execution_of(graph).signature
    assert signature is not None
    return model, graph, signature


def without(graph: fx.GraphModule, signature: CallSignature, *names: str) -> fx.GraphModule:
    result = fx.GraphModule(graph, copy_graph(graph.graph))
    (report,) = Pipeline((LeaveOutInputs(signature.omission(names)),)).run(result)
    assert report.edits == len(names)
    return result


def count(graph: fx.GraphModule, operator: Any) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=operator))


def test_a_loss_that_is_left_out_is_not_computed() -> None:
    model, graph, signature = captured()
    assert count(graph, aten.cross_entropy_loss.default) == 1
    shorter = without(graph, signature, "labels")
    assert count(shorter, aten.cross_entropy_loss.default) == 0
    (logits,) = shorter(X[:2], INPUTS["mask"][:2], None)
    torch.testing.assert_close(logits, model(X[:2])["logits"])


def test_a_mask_that_is_left_out_is_ones_of_the_size_of_the_call() -> None:
    model, graph, signature = captured()
    shorter = without(graph, signature, "mask", "labels")
    constants = shorter.graph.find_nodes(op="call_function", target=aten.full.default)
    mask, labels = sorted(constants, key=lambda node: str(node.kwargs["dtype"]))
    assert mask.args[1] == 1
    assert [str(user.target) for user in labels.users] == ["_guards_fn"], "nothing else reads the labels any more"
    for x in (X, X[:2, :5]):
        (logits,) = shorter(x, None, None)
        torch.testing.assert_close(logits, model(x)["logits"])


def test_the_graph_itself_stays_as_it_is() -> None:
    model, graph, signature = captured()
    before = str(graph.graph)
    without(graph, signature, "labels")
    assert str(graph.graph) == before
    assert graph(X).keys() == model(X).keys() == {"logits"}
    assert graph(**INPUTS).keys() == model(**INPUTS).keys() == {"loss", "logits"}
