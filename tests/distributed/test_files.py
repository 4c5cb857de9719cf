"""Files of sharded models are those of one process, to the bit, and other numbers of processes read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.distributed.training import Case, base_of, batch, graph_of, make
from tests.support.ranks import on_ranks

DORA = Case(llfx.DoRA(r=3))  # three rows are not divided evenly
NF4 = Case(llfx.LoRA(r=2), base="nf4")
WRITERS: dict[str, tuple[Any, Any]] = {
    "own": (llfx.save, llfx.load),
    "peft": (llfx.save_peft, llfx.load_peft),
}


def write(rank: int, folder: Path) -> dict[str, Any]:
    """Write the adapters of sharded models in all forms; return what was seen on the way."""
    model = llfx.shard(make(DORA))
    model(**batch(DORA, 0, rank))  # the parameters at the root are whole now
    kinds = {type(parameter) for parameter in llfx.adapter_parameters(model)}
    for name, (save, _) in WRITERS.items():
        save(model, folder / name)
    save_distributed({"adapters": llfx.adapter_state_dict(model)}, checkpoint_id=folder / "dcp")
    try:
        llfx.save(model, folder / "missing" / "file")
        failure = ""
    except llfx.CheckpointError as error:
        failure = str(error)
    return {"kinds": kinds, "failure": failure}


def write_others(rank: int, folder: Path) -> bool:
    """Write the adapters of a quantized model and of an adapted one; return whether the latter is still sharded."""
    llfx.save(llfx.shard(make(NF4)), folder / "nf4")
    adapted = llfx.adapt(base_of("llama"), DORA.cfg)
    llfx.load_adapter_state_dict(adapted, llfx.adapter_state_dict(make(DORA)))
    llfx.shard(adapted)
    adapted.save_pretrained(folder / "pretrained")
    # As accelerate and Trainer do: all gather, and one process saves.
    tensors = get_model_state_dict(adapted, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        adapted.save_pretrained(folder / "from state dict", state_dict=tensors)
    return all(isinstance(parameter, DTensor) for parameter in adapted.parameters())


def read(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read them in this number of processes, into models that are sharded before or afterwards."""
    found = {}
    for name, (_, load) in WRITERS.items():
        model = llfx.shard(load(graph_of("llama"), folder / name))
        found[name] = llfx.adapter_state_dict(model)
    model = llfx.shard(llfx.rewrite(graph_of("llama"), DORA.cfg))
    state = {"adapters": llfx.adapter_state_dict(model)}
    load_distributed(state, checkpoint_id=folder / "dcp")
    found["dcp"] = llfx.adapter_state_dict(model)
    other = llfx.shard(llfx.rewrite(graph_of("llama"), DORA.cfg))
    values = {name: whole(tensor) for name, tensor in found["own"].items()}
    with torch.no_grad():
        other(**batch(DORA, 0, 0))  # whole parameters at the root must not get the values
    llfx.load_adapter_state_dict(
        other, values if rank == 0 else {name: torch.zeros_like(t) for name, t in values.items()}
    )
    found["whole values of process 0"] = llfx.adapter_state_dict(other)
    llfx.load_adapter_state_dict(other, found["dcp"])
    found["sharded values"] = llfx.adapter_state_dict(other)
    loss = other(**batch(DORA, 0, 0)).loss
    assert torch.equal(loss, model(**batch(DORA, 0, 0)).loss)
    assert dist.get_world_size() == 3
    return {name: {key: whole(tensor) for key, tensor in tensors.items()} for name, tensors in found.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("adapters")
    return folder, on_ranks(write, 2, folder)


def expected(case: Case = DORA) -> dict[str, Tensor]:
    return llfx.adapter_state_dict(make(case))


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.broad
def test_an_optimizer_gets_the_parts_also_between_two_passes(written: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all(found["kinds"] == {DTensor} for found in written[1])


@pytest.mark.broad
@pytest.mark.parametrize("name", WRITERS)
def test_files_are_those_of_one_process(name: str, written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    save, load = WRITERS[name]
    path = written[0] / name
    equal(llfx.adapter_state_dict(load(graph_of("llama"), path)), expected())
    save(make(DORA), tmp_path / name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        assert file.read_bytes() == (tmp_path / file.relative_to(written[0])).read_bytes(), file


@pytest.mark.broad
def test_a_distributed_checkpoint_is_read_in_one_process(written: tuple[Path, list[dict[str, Any]]]) -> None:
    model = llfx.rewrite(graph_of("llama"), DORA.cfg)
    load_distributed({"adapters": llfx.adapter_state_dict(model)}, checkpoint_id=written[0] / "dcp", no_dist=True)
    equal(llfx.adapter_state_dict(model), expected())


@pytest.mark.broad
def test_what_process_0_cannot_write_is_an_error_in_all(written: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all("could not be written" in found["failure"] for found in written[1])


@pytest.mark.slow
def test_three_processes_read_what_two_wrote(written: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in on_ranks(read, 3, written[0]):
        for tensors in found.values():
            equal(tensors, expected())


@pytest.mark.slow
def test_files_of_quantized_and_adapted_models(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert all(on_ranks(write_others, 2, tmp_path)), "saving has left whole parameters behind"
    equal(llfx.adapter_state_dict(llfx.load(graph_of("nf4"), tmp_path / "nf4")), expected(NF4))
    for folder in ("pretrained", "from state dict"):
        loaded = llfx.load_peft(graph_of("llama"), tmp_path / folder)
        equal(llfx.adapter_state_dict(loaded), expected())
        loaded = llfx.load(graph_of("llama"), tmp_path / folder / "model.safetensors")
        equal(llfx.adapter_state_dict(loaded), expected())
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]
