"""Tensor parallel graphs in use: parts by process, files, switches, calls without gradients; and what is refused.

That they train like one process is among the cases of `training.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.distributed.training import QUANTIZED, Case, base_of, batch, graph_of, in_one_process, make, on_rank
from tests.support.conformance import close
from tests.support.ranks import on_ranks

DORA = Case(llfx.DoRA(r=3), base="gpt2", engine="parallel")  # three rows are not divided evenly
LORA = Case(llfx.LoRA(r=2), base="gpt2", engine="parallel")


def use(rank: int, folder: Path) -> dict[str, Any]:
    """Use a tensor parallel graph in all ways; return what was seen."""
    inputs = batch(DORA, 0, 0)
    alone, gm = make(DORA), make(DORA)
    bytes_of_all = sum(parameter.nbytes for parameter in gm.parameters())
    gm = llfx.parallelize(gm)
    parameters: dict[str, Any] = dict(gm.named_parameters())
    found: dict[str, Any] = {
        "places": {name: parameter.placements for name, parameter in parameters.items()},
        "bytes": sum(parameter.to_local().nbytes for parameter in parameters.values()) / bytes_of_all,
    }
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for model in (alone, gm):
        model(**inputs).loss.backward()
    norms = [torch.nn.utils.clip_grad_norm_(llfx.adapter_parameters(model), 0.01) for model in (alone, gm)]
    pairs["norm of the gradients"] = whole(norms[1]), norms[0]
    clipped = llfx.adapter_parameters(gm)[0].grad
    first = llfx.adapter_parameters(alone)[0].grad
    assert isinstance(clipped, Tensor)
    assert isinstance(first, Tensor)
    pairs["a clipped gradient"] = whole(clipped), first
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        pairs["without labels"] = gm(**text).logits, alone(**text).logits
        gm.eval(), alone.eval()
        pairs["evaluation"] = gm(**inputs).logits, alone(**inputs).logits
        with llfx.frozen(gm):
            pairs["frozen"] = gm(**inputs).logits, alone(**inputs).logits
        with llfx.active(gm, None), llfx.active(alone, None):
            pairs["the base"] = gm(**inputs).logits, alone(**inputs).logits
        with llfx.scaled(gm, {"default": -0.5}), llfx.scaled(alone, {"default": -0.5}):
            pairs["scaled"] = gm(**inputs).logits, alone(**inputs).logits
        ids = text["input_ids"][:1, :3]
        pairs["another shape"] = gm(ids).logits, alone(ids).logits
    found["pairs"] = pairs
    llfx.save(gm, folder / "own")
    llfx.save_peft(gm, folder / "peft")
    save_distributed({"adapters": llfx.adapter_state_dict(gm)}, checkpoint_id=folder / "dcp")
    found["refused"] = refuse_all()
    return found


def read(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the files in this number of processes, before the graph is divided and afterwards."""
    gm = llfx.parallelize(llfx.load(graph_of("gpt2"), folder / "own"))
    other = llfx.parallelize(llfx.rewrite(graph_of("gpt2"), DORA.cfg))
    load_distributed({"adapters": llfx.adapter_state_dict(other)}, checkpoint_id=folder / "dcp")
    third = llfx.parallelize(llfx.rewrite(graph_of("gpt2"), DORA.cfg))
    llfx.load_adapter_state_dict(third, {name: whole(t) for name, t in llfx.adapter_state_dict(gm).items()})
    graphs = {"own": gm, "dcp": other, "state dict": third}
    return {n: {k: whole(tensor) for k, tensor in llfx.adapter_state_dict(g).items()} for n, g in graphs.items()}


def random_base(rank: int) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RReLU(), torch.nn.Linear(4, 4))
    return llfx.parallelize(llfx.rewrite(model, llfx.LoRA(r=2, target_names="0"), (torch.ones(2, 4),)))


def random_heads(rank: int) -> Any:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x)[0]
            return y

    return llfx.parallelize(llfx.rewrite(Attention(), llfx.LoRA(r=2, target_names="out_proj")))


def planned(rank: int) -> Any:
    gm = make(LORA)
    llfx.plan_memory(gm, "balanced")
    return llfx.parallelize(gm)


def quantized(base: str, rank: int) -> Any:
    return llfx.parallelize(make(replace(LORA, base=base)))


def two_dimensions(rank: int) -> Any:
    return llfx.parallelize(make(LORA), init_device_mesh("cpu", (1, dist.get_world_size())))


@functools.cache
def divided() -> Any:
    return llfx.parallelize(make(LORA))


def other_base(rank: int) -> Any:
    gm = make(LORA)
    weight = gm.transformer.wpe.weight
    gm.transformer.wpe.weight = torch.nn.Parameter(weight + rank, requires_grad=False)
    return llfx.parallelize(gm)


@functools.cache
def dropping() -> Any:
    return llfx.parallelize(llfx.rewrite(graph_of("gpt2"), llfx.LoRA(r=2, dropout=0.5)))


REFUSED: dict[str, tuple[Callable[[int], object], str]] = {
    "random numbers": (random_base, r"rrelu.*draws random numbers, which would differ by process.*switch it off"),
    "dropout of MultiheadAttention": (random_heads, "nn.MultiheadAttention has dropout.*The way out: dropout of 0"),
    "planned memory": (planned, "its memory is planned"),
    **{
        base: (
            functools.partial(quantized, base),
            r"quantized ones are computed. The way out: .*for a quantized base llfx.shard\(model\)",
        )
        for base in QUANTIZED
    },
    "a mesh of two dimensions": (two_dimensions, "the mesh has 2 dimensions"),
    "other weights": (other_base, "parallelize: processes 0 and 1 have different models: transformer.wpe.weight"),
    "no such role": (
        lambda rank: llfx.parallelize(make(LORA), columns=("router",), rows=()),
        r"no linear of the roles \['router'\] has a weight that can be divided",
    ),
    "wrapped": (
        lambda rank: llfx.parallelize(llfx.wrap(graph_of("gpt2"), LORA.cfg)),
        "takes what rewrite, load or adapt returned",
    ),
    "a stage": (lambda rank: llfx.parallelize(llfx.split(make(LORA), 2)[0]), "divided already"),
    "twice": (lambda rank: llfx.parallelize(divided()), "divided already"),
    "shard": (lambda rank: llfx.shard(divided()), "sharded already"),
    "add": (
        lambda rank: llfx.add(divided(), {"b": LORA.cfg}),
        "add cannot change a model whose parameters are sharded",
    ),
    "export": (
        lambda rank: torch.export.export(divided(), (), batch(LORA, 0, 0)),
        "torch.export does not take DTensors.*export before parallelize",
    ),
    "another mode": (
        lambda rank: dropping().train(rank == 0)(**batch(LORA, 0, 0)),
        "Processes 0 and 1 call a graph that they compute together with other values of the mode",
    ),
    "merge": (lambda rank: llfx.merge(divided()), "its parameters are DTensors"),
}


def refuse_all() -> dict[str, str]:
    errors = {}
    for name, (call, _) in REFUSED.items():
        try:
            call(dist.get_rank())
        except llfx.AdapterError as error:
            errors[name] = str(error)
    return errors


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("parallel")
    return folder, on_ranks(use, 2, folder)


@pytest.mark.slow
def test_weights_and_adapters_are_divided_as_their_sites_are(used: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in used[1]:
        places = found["places"]
        attention, mlp = "transformer.h.0.attn.", "transformer.h.0.mlp."
        for name, place in {
            f"{attention}c_attn.weight": Shard(1),  # the weights of GPT-2 are transposed
            f"{attention}c_attn.lora_A": Replicate(),
            f"{attention}c_attn.lora_B": Shard(0),
            f"{attention}c_attn.lora_m": Replicate(),
            f"{attention}c_proj.weight": Shard(0),
            f"{attention}c_proj.lora_A": Shard(1),
            f"{attention}c_proj.lora_B": Replicate(),
            f"{attention}c_attn.bias": Shard(0),
            f"{attention}c_proj.bias": Replicate(),
            f"{mlp}c_fc.weight": Shard(1),
            "transformer.wte.weight": Replicate(),
        }.items():
            assert places[name] == (place,), name
        assert found["bytes"] < 0.7


@pytest.mark.slow
def test_all_calls_are_those_of_one_process(used: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in used[1]:
        for name, (ours, theirs) in found["pairs"].items():
            assert not isinstance(ours, DTensor), name
            close(ours, theirs, 1e-9, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_in_all_processes(name: str, used: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in used[1]:
        assert name in found["refused"], "nothing was raised"
        assert re.search(REFUSED[name][1], found["refused"][name]), found["refused"][name]


@pytest.mark.slow
def test_files_are_those_of_one_process(used: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    llfx.save(make(DORA), tmp_path / "own")
    assert (used[0] / "own").read_bytes() == (tmp_path / "own").read_bytes()
    llfx.save_peft(make(DORA), tmp_path / "peft")
    for file in sorted((tmp_path / "peft").iterdir()):
        assert (used[0] / "peft" / file.name).read_bytes() == file.read_bytes(), file


@pytest.mark.broad
def test_without_processes_parallelize_says_how_to_start_them() -> None:
    with pytest.raises(llfx.AdapterError, match="torchrun --nproc-per-node N"):
        llfx.parallelize(make(LORA))


@pytest.mark.slow
def test_four_processes_read_what_two_wrote(used: tuple[Path, list[dict[str, Any]]]) -> None:
    expected = llfx.adapter_state_dict(make(DORA))
    for found in on_ranks(read, 4, used[0]):
        for tensors in found.values():
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


ADAPTED = Case(llfx.LoRA(r=2), "adapt", engine="parallel")
GENERATED: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"do_sample": True},
}


def use_adapted(rank: int, folder: Path) -> dict[str, Any]:
    """Use an adapted model in all ways; return what was seen of it, divided, and of one that is not."""
    alone, model = make(ADAPTED).eval(), llfx.parallelize(make(ADAPTED)).eval()
    inputs = batch(ADAPTED, 0, 0)
    padded = inputs | {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
    ids = {name: padded[name] for name in ("input_ids", "attention_mask")}
    found: dict[str, Any] = {"logits": (model(**padded).logits, alone(**padded).logits)}
    for name, options in GENERATED.items():
        for each in (alone, model):
            torch.manual_seed(3)
            tokens = each.generate(**ids, **options, max_new_tokens=5, pad_token_id=0)
            found.setdefault(name, []).append(tokens)
    model.save_pretrained(folder / "adapters")
    errors: dict[str, Any] = {
        "another call": lambda: model(ids["input_ids"], output_hidden_states=True),
        "other inputs": lambda: model(**inputs | {"input_ids": inputs["input_ids"] + rank}),
        "another length": lambda: model(inputs["input_ids"][:, rank:]),
        "sampled by other seeds": lambda: (
            torch.manual_seed(rank) and model.generate(**ids, do_sample=True, max_new_tokens=5)
        ),
        "merge": lambda: llfx.merge(model),
        "remove": lambda: llfx.remove(model),
        "planned": lambda: llfx.plan_memory(model, "balanced"),
    }
    for name, call in errors.items():
        try:
            call()
        except llfx.AdapterError as error:
            found[name] = str(error)
    return found


@pytest.mark.slow
def test_an_adapted_model_generates_like_one_process_and_refuses_what_would_differ(tmp_path: Path) -> None:
    expected = llfx.adapter_state_dict(make(ADAPTED))
    for found in on_ranks(use_adapted, 2, tmp_path):
        ours, theirs = found["logits"]
        close(ours, theirs, 1e-5, "logits")
        for name in GENERATED:
            assert torch.equal(*found[name]), name
        assert (
            "has no graph yet, and none can be captured of a model whose parameters are sharded"
            in found["another call"]
        )
        for name in ("other inputs", "another length", "sampled by other seeds"):
            assert "Processes 0 and 1 call a graph that they compute together with other values" in found[name]
        assert "other values of input_ids" in found["other inputs"]
        assert "the parameters of the graph are DTensors, and plans measure whole tensors" in found["planned"]
        for name in ("merge", "remove"):
            assert f"{name} does not take a model whose parameters are sharded" in found[name]
        assert "torch.manual_seed(0)" in found["sampled by other seeds"]
    read = llfx.adapt(base_of("llama"), tmp_path / "adapters")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in llfx.adapter_state_dict(read).items())


FEW_HEADS = {"gpt2": 1e-9, "llama": 1e-4}
"""Models of two heads, or two of keys and values, and how exact: the norms of the second one are in float32."""


def train(rank: int) -> dict[str, Any]:
    return {name: on_rank(rank, replace(LORA, base=name)) for name in FEW_HEADS}


@pytest.mark.slow
def test_four_processes_train_like_one_though_there_are_two_heads() -> None:
    expected = {name: in_one_process(replace(LORA, base=name), 1) for name in FEW_HEADS}
    for found in on_ranks(train, 4):
        for base, tolerance in FEW_HEADS.items():
            for what in ("gradients", "after"):
                for name, tensor in expected[base][what].items():
                    close(found[base][what][name], tensor, tolerance, f"{base}, {what}: {name}")
