"""Adapters of other ranks and sites are swapped into one room, and nothing is compiled again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import lora_lite_fx as llfx
from tests.adapters.test_switches import fill
from tests.support.captured import captured
from tests.support.models import GatedMLP, ResidualMLP, double_net, ids

EXAMPLE, X = (ids(2, 5),), ids(3, 4)
ROOM = llfx.LoRA(r=8, alpha=4, target_names=(".",))
SOURCES: list[Any] = [
    llfx.LoRA(r=2, target_names=("gate|head",)),
    llfx.PiSSA(r=3, target_names=("up|down",)),
    llfx.LoRA(r=8, rank_pattern={"gate": 1}, target_names=(".",)),
    llfx.HRA(r=4, target_names=("fc_in",)),
    [llfx.LoRA(r=2, target_names=("gate",)), llfx.LoRA(r=3, target_names=("gate|up",))],
]


def base() -> Any:
    """Return the graph of the model."""
    return captured(double_net, GatedMLP, ResidualMLP, inputs=EXAMPLE)[1]


def source_of(graph: Any, cfg: Any, seed: int) -> Any:
    source = llfx.rewrite(graph, cfg)
    fill(source, seed)
    return source


@pytest.mark.broad
def test_a_compiled_graph_computes_each_adapter_without_compiling_again() -> None:
    graph = base()
    gm = llfx.rewrite(graph, {"slot": ROOM, "other": llfx.IA3(target_names=("gate",))})
    llfx.active(gm, "slot")
    torch.compiler.reset()
    counters.clear()
    compiled: Any = torch.compile(gm, backend="eager")
    with torch.no_grad():
        for index in range(10):
            source = source_of(graph, SOURCES[index % len(SOURCES)], index)
            llfx.swap(gm, source, "slot")
            torch.testing.assert_close(compiled(X), source(X))
            torch.testing.assert_close(gm(X), source(X))
    assert counters["stats"]["unique_graphs"] == 1


def test_an_exported_program_and_a_wrapped_model_take_other_adapters() -> None:
    model, graph = captured(double_net, GatedMLP, ResidualMLP, inputs=EXAMPLE)  # wrap needs the model, too
    exported: Any = torch.export.export(llfx.rewrite(graph, ROOM), EXAMPLE).module()
    wrapped = llfx.wrap(graph, ROOM)
    for index, cfg in enumerate(SOURCES):
        source = source_of(graph, cfg, index)
        for target in (exported, wrapped):
            llfx.swap(target, source)
            torch.testing.assert_close(target(EXAMPLE[0]), source(EXAMPLE[0]))
    assert type(wrapped) is type(model)


def test_what_does_not_fit_the_room_is_refused_and_nothing_is_written() -> None:
    graph = base()
    gm = llfx.rewrite(graph, {"slot": llfx.LoRA(r=2, target_names=("gate|up",)), "ia3": llfx.IA3()})
    fill(gm)
    before = {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(gm).items()}
    cases: list[tuple[Any, str, str]] = [
        (llfx.LoRA(r=3, target_names=("gate",)), "slot", "the rank 3 at 'blocks.0.gate', and 'slot' has room for 2"),
        (llfx.LoRA(r=1, target_names=("gate|head",)), "slot", "adapts 'head', at which 'slot' has no room"),
        (llfx.LoRA(r=1, bias=True, target_names=("gate",)), "slot", "changes the bias too"),
        (llfx.LoRA(r=1, target_names=("gate",)), "ia3", "is a LoRA without bias, and 'ia3' is IA3"),
        (llfx.LoRA(r=1, target_names=("gate",)), "it", "no adapter 'it'"),
    ]
    for cfg, name, message in cases:
        with pytest.raises(llfx.AdapterError, match=message):
            llfx.swap(gm, source_of(graph, cfg, 1), name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llfx.adapter_state_dict(gm).items())
