"""Copies of models whose tensors are shared, and of graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_lite_fx.graph.copies import head_of, prepare_copy


def prepared_copy(model: nn.Module) -> Any:
    memo: dict[int, Any] = {}
    prepare_copy(model, memo)
    return copy.deepcopy(model, memo)


def test_a_copy_has_empty_registries_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    copied = prepared_copy(model)
    copied[0].register_forward_hook(lambda module, args, output: 2 * output)
    copied[1].register_buffer("more", torch.ones(1))
    x = torch.ones(1, 2)
    assert torch.equal(copied(x), 2 * model(x).relu())
    assert [name for name, _ in model.named_buffers()] == []


def test_what_modules_share_is_shared_in_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    shared: dict[str, int] = {}
    vars(model[0])["calls"] = vars(model[1])["calls"] = shared
    copied = prepared_copy(model)
    copied[0].calls["first"] = 1
    assert copied[1].calls == {"first": 1}
    assert shared == {}


@pytest.mark.parametrize("empty", [{}, set(), [], None], ids=repr)
def test_attributes_of_a_copy_are_of_the_types_of_the_original(empty: Any) -> None:
    model = nn.Linear(2, 2)
    vars(model)["extra"] = empty
    copied = prepared_copy(model)
    assert {name: type(value) for name, value in vars(copied).items()} == {
        name: type(value) for name, value in vars(model).items()
    }


def test_the_head_of_a_graph_takes_the_same_arguments() -> None:
    def function(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x * scale

    graph = fx.symbolic_trace(function).graph
    head = fx.GraphModule(nn.Module(), head_of(graph))
    assert head(torch.ones(1)) == ()
    assert head(torch.ones(1), scale=3.0) == ()
    assert len(graph.nodes) == 4
