"""What cannot be sharded is refused in all processes before anything is changed, and sharded models refuse changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_lite_fx as llfx
from tests.distributed.training import Case as TrainingCase
from tests.distributed.training import base_of, batch, graph_of, make
from tests.support.ranks import on_ranks

LORA = llfx.LoRA(r=2)
PLAIN = TrainingCase(LORA)


def _lora() -> Any:
    return llfx.rewrite(graph_of("llama"), LORA)


def _other_ranks(rank: int) -> None:
    llfx.shard(llfx.rewrite(graph_of("llama"), llfx.LoRA(r=2 + rank)))


def _other_base(rank: int) -> None:
    gm = _lora()
    gm.get_submodule("model.norm").weight.data = torch.full((32,), 1.0 + rank).double()
    llfx.shard(gm)


def _a_problem_of_one_process(rank: int) -> None:
    gm = _lora()
    if rank == 1:
        weight = gm.get_submodule("lm_head").weight
        weight.data = weight.data.t().contiguous().t()
    llfx.shard(gm)


def _cast(rank: int) -> None:
    llfx.shard(_lora(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def _two_types(rank: int) -> None:
    configs = [llfx.LoRA(r=2, dtype=torch.float32), llfx.LoRA(r=2)]
    llfx.shard(llfx.rewrite(graph_of("llama"), configs))


def _ignored_that_trains(rank: int) -> None:
    gm = _lora()
    llfx.shard(gm, ignored_params={llfx.adapter_parameters(gm)[0]})


class _Tied(nn.Module):
    """Layers of which the second one's weight is the head too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 8)
        second: Any = self.layers[1]
        self.head.weight = second[0].weight

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class _ReadElsewhere(_Tied):
    """Layers of which another module reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        first: Any = self.layers[0]
        return super().forward(x) + first[0].bias.exp()


def _tied(rank: int) -> None:
    llfx.shard(llfx.rewrite(_Tied(), llfx.LoRA(r=2, target_names=r"layers\.0"), (torch.ones(2, 8),)))


def _read_elsewhere(rank: int) -> None:
    llfx.shard(llfx.rewrite(_ReadElsewhere(), llfx.LoRA(r=2, target_names=r"layers\.1"), (torch.ones(2, 8),)))


def _wrapped(rank: int) -> None:
    llfx.shard(llfx.wrap(graph_of("llama"), LORA))


@functools.cache
def _sharded() -> Any:
    gm = llfx.shard(_lora())
    gm(**batch(PLAIN, 0, 0))
    return gm


@functools.cache
def _sharded_adapted() -> Any:
    return llfx.shard(llfx.adapt(base_of("llama"), LORA))


def _a_module_in_a_layer(rank: int) -> None:
    gm = _lora()
    fully_shard(gm.model.layers[0].mlp)
    fully_shard(gm)
    gm(**batch(PLAIN, 0, 0))


REFUSED: dict[str, tuple[Callable[[int], object], str]] = {
    "other ranks": (_other_ranks, r"different models: \S*lora_A is torch.float64 \(2, 32\)"),
    "other weights": (_other_base, "different models: model.norm.weight"),
    "a problem of one process": (_a_problem_of_one_process, "lm_head.weight is not contiguous"),
    "types that are cast": (_cast, "mp_policy casts parameters to torch.bfloat16, and .* a graph has the types"),
    "two types to train": (_two_types, "fully_shard takes parameters of one type to train"),
    "ignored and trained": (_ignored_that_trains, "ignored_params has a parameter that trains"),
    "one parameter in two units": (_tied, "layers.1.0.weight and head.weight are one parameter"),
    "read outside of its layer": (_read_elsewhere, "the graph reads layers.0.0.bias outside of the layer 'layers.0'"),
    "wrapped": (_wrapped, "runs no graph. The way out, for a result of wrap: call fully_shard"),
    "sharded already": (lambda rank: llfx.shard(_sharded()), "its parameters are sharded already"),
    "a module in a layer": (_a_module_in_a_layer, "fully_shard was called on 'model.layers.0.mlp', which the graph"),
    "add": (lambda rank: llfx.add(_sharded(), {"b": LORA}), "add cannot change a model whose parameters are sharded"),
    "delete": (lambda rank: llfx.delete(_sharded(), "default"), "delete cannot change a model whose parameters"),
    "combine": (lambda rank: llfx.combine(_sharded(), {"default": 1.0}, "b"), "combine cannot change a model"),
    "merge": (lambda rank: llfx.merge(_sharded()), "its parameters are sharded. The way out: do this before"),
    "remove": (lambda rank: llfx.remove(_sharded()), "its parameters are sharded. The way out: do this before"),
    "a call of a new kind": (
        lambda rank: _sharded_adapted()(batch(PLAIN, 0, 0)["input_ids"], output_hidden_states=True),
        "has no graph yet, and none can be captured of a model whose parameters are sharded",
    ),
}


def refuse_all(rank: int) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for name, (call, _) in REFUSED.items():
        try:
            call(rank)
        except llfx.AdapterError as error:
            errors[name] = str(error)
    gm = _lora()  # what was refused above has changed nothing: the same model can be sharded still
    try:
        llfx.shard(gm, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    except llfx.AdapterError:
        llfx.shard(gm)(**batch(PLAIN, 0, 0)).loss.backward()
    return errors


@functools.cache
def refusals() -> list[dict[str, Any]]:
    return on_ranks(refuse_all, 2, seconds=300.0)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_in_all_processes(name: str) -> None:
    for errors in refusals():
        assert name in errors, "nothing was raised"
        assert re.search(REFUSED[name][1], errors[name]), errors[name]


def test_without_processes_shard_says_how_to_start_them() -> None:
    with pytest.raises(llfx.AdapterError, match="torchrun --nproc-per-node N"):
        llfx.shard(make(PLAIN))
