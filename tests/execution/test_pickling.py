"""Pickling a graph: an error, because what comes back would have lost its adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx


@pytest.fixture(scope="module", params=["symbolic", "exported"])
def graph(request: pytest.FixtureRequest) -> nn.Module:
    inputs = (torch.ones(2, 4),) if request.param == "exported" else None
    return llfx.rewrite(nn.Sequential(nn.Linear(4, 4)), llfx.LoRA(r=2, target_names="0"), inputs)


@pytest.mark.parametrize(
    "write",
    [pickle.dumps, lambda gm: torch.save(gm, io.BytesIO()), lambda gm: torch.save({"model": gm}, io.BytesIO())],
)
def test_a_graph_is_not_pickled_without_its_adapters(write: Callable[[Any], Any], graph: nn.Module) -> None:
    with pytest.raises(llfx.AdapterError, match=r"cannot be pickled.*llfx\.save\(graph, path\).*copy\.deepcopy"):
        write(graph)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_graph_is_copied_with_its_adapters(duplicate: Callable[[Any], Any], graph: nn.Module) -> None:
    assert llfx.adapter_state_dict(duplicate(graph)).keys() == llfx.adapter_state_dict(graph).keys()
