"""What cannot be sharded is refused in all processes before anything is changed, and sharded models refuse changes."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lora_lite_fx as llfx
from tests.distributed.training import Case as TrainingCase
from tests.distributed.training import base_of, batch, make
from tests.support.ranks import on_ranks

LORA = llfx.LoRA(r=2, target_names=r"layers\.0")
HUGGING_FACE = TrainingCase(llfx.LoRA(r=2), "adapt")
X = torch.ones(2, 8)
PARALLELIZE = r"The way out.*llfx.parallelize\(model\) or llfx.shard\(model\)"


class _Layers(nn.Module):
    """Two layers and a head, which are captured in no time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _adapted(model: nn.Module | None = None, cfg: Any = LORA) -> Any:
    return llfx.rewrite(_Layers() if model is None else model, cfg, (X,))


def _other_ranks(rank: int) -> None:
    llfx.shard(_adapted(cfg=llfx.LoRA(r=2 + rank, target_names=r"layers\.0")))


def _other_base(rank: int) -> None:
    gm = _adapted()
    gm.get_submodule("head").bias.data = torch.full((6,), 1.0 + rank)
    llfx.shard(gm)


def _a_problem_of_one_process(rank: int) -> None:
    gm = _adapted()
    if rank == 1:
        weight = gm.get_submodule("head").weight
        weight.data = weight.data.t().contiguous().t()
    llfx.shard(gm)


def _cast(rank: int) -> None:
    llfx.shard(_adapted(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def _two_types(rank: int) -> None:
    configs = [LORA, llfx.LoRA(r=2, dtype=torch.float64, target_names=r"layers\.0")]
    llfx.shard(_adapted(cfg=configs))


def _ignored_that_trains(rank: int) -> None:
    gm = _adapted()
    llfx.shard(gm, ignored_params={llfx.adapter_parameters(gm)[0]})


class _Tied(_Layers):
    """Layers of which the second one's weight is the head too."""

    def __init__(self) -> None:
        super().__init__()
        second: Any = self.layers[1]
        self.head = nn.Linear(8, 8)
        self.head.weight = second[0].weight


class _ReadElsewhere(_Layers):
    """Layers of which another module reads a bias."""

    def forward(self, x: torch.Tensor) -> Any:
        second: Any = self.layers[1]
        return super().forward(x) + second[0].bias.sum().exp()


def _tied(rank: int) -> None:
    llfx.shard(_adapted(_Tied()))


def _read_elsewhere(rank: int) -> None:
    llfx.shard(_adapted(_ReadElsewhere()))


def _parallel() -> nn.Module:
    """Return a model whose first layer is divided by columns."""
    model = _Layers()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"layers.0.0": ColwiseParallel()})


def _parallel_llama() -> nn.Module:
    """Return a model of transformers whose layers are divided as its own plan says."""
    model = copy.deepcopy(base_of("llama"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})


def _wrapped(rank: int) -> None:
    llfx.shard(llfx.wrap(_Layers(), LORA, (X,)))


@functools.cache
def _sharded() -> Any:
    gm = llfx.shard(_adapted())
    gm(X)
    return gm


def _a_module_in_a_layer(rank: int) -> None:
    gm = _adapted()
    fully_shard(gm.get_submodule("layers.0.0"))
    fully_shard(gm)
    gm(X)


REFUSED: dict[str, tuple[Callable[[int], object], str]] = {
    "other ranks": (_other_ranks, r"different models: \S*lora_A is torch.float32 \(2, 8\)"),
    "other weights": (_other_base, "different models: head.bias"),
    "a problem of one process": (_a_problem_of_one_process, "head.weight is not contiguous"),
    "types that are cast": (_cast, "mp_policy casts parameters to torch.bfloat16, and .* a graph has the types"),
    "two types to train": (_two_types, "fully_shard takes parameters of one type to train"),
    "ignored and trained": (_ignored_that_trains, "ignored_params has a parameter that trains"),
    "one parameter in two units": (
        _tied,
        "layers.1.0.weight and head.weight are one parameter",
    ),
    "read outside of its layer": (_read_elsewhere, "the graph reads layers.1.0.bias outside of the layer 'layers.1'"),
    "wrapped": (_wrapped, "runs no graph. The way out, for a result of wrap: call fully_shard"),
    "tensor parallel, rewrite": (lambda rank: _adapted(_parallel()), f"its parameters are DTensors.*{PARALLELIZE}"),
    "tensor parallel, wrap": (
        lambda rank: llfx.wrap(_parallel(), LORA, (X,)),
        f"its parameters are DTensors.*{PARALLELIZE}",
    ),
    "tensor parallel, adapt": (
        lambda rank: llfx.adapt(_parallel_llama(), HUGGING_FACE.cfg),
        f"its parameters are DTensors.*{PARALLELIZE}",
    ),
    "tensor parallel, backend": (
        lambda rank: llfx.backend(LORA).adapt(_parallel(), X),
        f"backend cannot adapt a model whose parameters are sharded.*{PARALLELIZE}",
    ),
    "a mesh without names": (
        lambda rank: llfx.shard(_adapted(), init_device_mesh("cpu", (1, 2))),
        r"or of two with names, not of 2 with none",
    ),
    "sharded already": (lambda rank: llfx.shard(_sharded()), "its parameters are sharded already"),
    "a module in a layer": (_a_module_in_a_layer, "fully_shard was called on 'layers.0.0', which the graph"),
    "add": (lambda rank: llfx.add(_sharded(), {"b": LORA}), "add cannot change a model whose parameters are sharded"),
    "delete": (lambda rank: llfx.delete(_sharded(), "default"), "delete cannot change a model whose parameters"),
    "combine": (lambda rank: llfx.combine(_sharded(), {"default": 1.0}, "b"), "combine cannot change a model"),
    "merge": (lambda rank: llfx.merge(_sharded()), "its parameters are sharded. The way out: do this before"),
    "remove": (lambda rank: llfx.remove(_sharded()), "its parameters are sharded. The way out: do this before"),
}


def refuse_all(rank: int) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for name, (call, _) in REFUSED.items():
        try:
            call(rank)
        except llfx.AdapterError as error:
            errors[name] = str(error)
    gm = _adapted()  # what was refused above has changed nothing: the same model can be sharded still
    try:
        llfx.shard(gm, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    except llfx.AdapterError:
        llfx.shard(gm)(X).sum().backward()
    return errors


@functools.cache
def refusals() -> list[dict[str, Any]]:
    return on_ranks(refuse_all, 2)


@pytest.mark.broad
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_in_all_processes(name: str) -> None:
    for errors in refusals():
        assert name in errors, "nothing was raised"
        assert re.search(REFUSED[name][1], errors[name]), errors[name]


def test_without_processes_shard_says_how_to_start_them() -> None:
    with pytest.raises(llfx.AdapterError, match="torchrun --nproc-per-node N"):
        llfx.shard(_adapted())


def call_in_a_new_way(rank: int) -> str:
    model = llfx.shard(make(HUGGING_FACE))
    with pytest.raises(llfx.AdapterError) as caught:
        model(batch(HUGGING_FACE, 0, 0)["input_ids"], output_hidden_states=True)
    return str(caught.value)


@pytest.mark.slow
def test_a_call_of_a_sharded_model_that_has_no_graph_is_refused() -> None:
    (message,) = on_ranks(call_in_a_new_way, 1)
    assert "has no graph yet, and none can be captured of a model whose parameters are sharded" in message
