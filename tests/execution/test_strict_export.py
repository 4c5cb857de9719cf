"""Strict export traces the flat graph, with the records of its adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import lora_lite_fx as llfx
from tests.support.conformance import close, output, randomise, small
from tests.support.models import Attention, Conv1DMLP, ids, net
from tests.support.selection import broad_after


def strict(model: nn.Module) -> fx.GraphModule:
    program = torch.export.export(model, (ids(2, 5),), strict=True, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    result: fx.GraphModule = program.module()
    return result


@pytest.mark.parametrize("cls", broad_after(1, [llfx.LoRA, llfx.DoRA, llfx.IA3, llfx.OFT, llfx.HRA]))
def test_strict_export_keeps_the_records(cls: type[llfx.Variant]) -> None:
    model = net(Conv1DMLP)
    gm = llfx.rewrite(model, small(cls, target_names=("blocks",)), (ids(2, 5),)).eval()
    randomise(gm, 1)
    exported, other = strict(gm), (ids(3, 4),)
    expected = output(gm, other).detach()
    close(output(exported, other).detach(), expected, 1e-5, "exported")
    assert [(row.name, row.adapters) for row in llfx.inspect(exported)] == [
        (row.name, row.adapters) for row in llfx.inspect(gm)
    ]
    assert list(llfx.adapter_state_dict(exported)) == list(llfx.adapter_state_dict(gm))
    close(output(llfx.merge(exported), other), expected, 1e-5, "merged")
    close(output(llfx.remove(exported), other), output(model, other).detach(), 1e-6, "removed")


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return 2 * y


@pytest.mark.broad
@pytest.mark.parametrize("function", broad_after(1, [llfx.inspect, llfx.merge, llfx.remove, llfx.adapter_state_dict]))
def test_a_graph_around_an_adapted_one_is_refused(function: object) -> None:
    gm = llfx.rewrite(net(Attention), llfx.LoRA(r=2, target_names=("q$",)), (ids(2, 5),)).eval()
    exported = strict(Around(gm))
    assert callable(function)
    with pytest.raises(llfx.AdapterError, match=r"around an adapted graph.*use the adapted graph itself"):
        function(exported)
