"""Four processes, and a mesh of two dimensions that copies what it divides; two processes go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.distributed.training import STEPS, Case, batch, graph_of, in_one_process, make, on_rank, optimizer_of
from tests.support.conformance import close
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.slow

BATCHES = 4  # of a step, one for each of four processes
STOP = 2  # after so many steps two processes go on
CASES = {"LoRA": Case(llfx.LoRA(r=2)), "DoRA": Case(llfx.DoRA(r=3), settings={"checkpoint_layers": True})}


def train(rank: int, two_dimensions: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part")) if two_dimensions else None
    found = {}
    for name, case in CASES.items():
        found[name] = on_rank(rank, Case(case.cfg, settings=case.settings, options={"mesh": mesh}))
    return found


@pytest.mark.parametrize("two_dimensions", [False, True])
def test_four_processes_train_like_one(two_dimensions: bool) -> None:
    results = on_ranks(train, 4, two_dimensions)
    for name, case in CASES.items():
        expected = in_one_process(case, 4)
        for rank, found in enumerate(results):
            losses = torch.tensor([found[name]["losses"], expected["losses"][rank]])
            close(losses[0], losses[1], 1e-6, "losses")
            for what in ("gradients", "after"):
                assert found[name][what].keys() == expected[what].keys()
                for tensor, value in found[name][what].items():
                    close(value, expected[what][tensor], 1e-9, f"{what}: {tensor}")


def _steps(model: Any, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    own = BATCHES // dist.get_world_size()
    for step in steps:
        for process in range(rank * own, (rank + 1) * own):
            (model(**batch(CASES["LoRA"], step, process)).loss / own).backward()
        optimizer.step()
        optimizer.zero_grad()


def begin(rank: int, folder: Path) -> None:
    """Train the first steps, and write adapters and optimizer."""
    model = llfx.shard(make(CASES["LoRA"]), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part")))
    optimizer = optimizer_of(model)
    _steps(model, optimizer, rank, range(STOP))
    llfx.save(model, folder / "adapter.safetensors")
    state = {"adapters": llfx.adapter_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    save_distributed(state, checkpoint_id=folder / "checkpoint")


def go_on(rank: int, folder: Path) -> dict[str, Tensor]:
    """Read them in another number of processes, and train the other steps; return the adapters."""
    model = llfx.shard(llfx.rewrite(graph_of("llama"), CASES["LoRA"].cfg)).train()
    optimizer = optimizer_of(model)
    adapters, states = llfx.adapter_state_dict(model), get_optimizer_state_dict(model, optimizer)
    load_distributed({"adapters": adapters, "optimizer": states}, checkpoint_id=folder / "checkpoint")
    set_optimizer_state_dict(model, optimizer, states)
    loaded = llfx.adapter_state_dict(llfx.load(graph_of("llama"), folder / "adapter.safetensors"))
    for name, tensor in llfx.adapter_state_dict(model).items():
        assert torch.equal(whole(tensor), loaded[name]), name
    _steps(model, optimizer, rank, range(STOP, STEPS))
    return {name: whole(tensor).clone() for name, tensor in llfx.adapter_state_dict(model).items()}


def test_two_processes_go_on_where_four_stopped(tmp_path: Path) -> None:
    on_ranks(begin, 4, tmp_path)
    expected = in_one_process(CASES["LoRA"], BATCHES)["after"]
    for found in on_ranks(go_on, 2, tmp_path):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            close(tensor, expected[name], 1e-9, name)
