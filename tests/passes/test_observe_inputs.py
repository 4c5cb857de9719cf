"""`observe_inputs`: the inputs of sites run through observers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    ObserveInputs,
    Observer,
)
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.programs import (
    after,
)

aten = torch.ops.aten


def test_an_observer_sums_the_inputs_of_its_site_and_changes_nothing() -> None:
    gm = llfx.rewrite(Down(), llfx.LoRA(r=2, target_names=("proj",)), EXAMPLE)
    observer = Observer(lambda inputs: inputs.sum(0))
    observed, report = after(gm, ObserveInputs({"proj": [observer]}))
    assert report.edits == 1
    calls = [len(each.graph.find_nodes(op="call_module", target="observer_0")) for each in (gm, observed)]
    assert calls == [0, 1]
    expected = gm(*EXAMPLE)
    assert observer.statistic is None
    for _ in range(2):
        assert torch.equal(observed(*EXAMPLE), expected)
    statistic = observer.statistic
    assert statistic is not None
    assert observer.tokens == 2 * 2
    (x,) = EXAMPLE
    hidden = torch.relu(F.linear(x, gm.get_parameter("fc.weight"), gm.get_parameter("fc.bias")))
    torch.testing.assert_close(observer.total, 2 * hidden.sum(0).detach())


def test_padding_is_left_out() -> None:
    observer = Observer(lambda inputs: inputs.sum(0))
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert observer(x, torch.tensor([[0, 1, 1]])) is x
    assert observer.tokens == 2
    torch.testing.assert_close(observer.total, torch.tensor([6.0, 8.0]))
