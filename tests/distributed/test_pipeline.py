"""Stages of a pipeline train like the model in one process; what cannot be cut is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.distributed.pipelines import (
    EVERYDAY,
    FOUR,
    PIPES,
    Pipe,
    batch,
    graph_of,
    in_one_process,
    make,
    save_stages,
    train_all,
    train_four,
    without,
)
from tests.distributed.training import QUANTIZED, Case, base_of
from tests.distributed.training import batch as training_batch
from tests.distributed.training import make as make_case
from tests.support.conformance import close
from tests.support.ranks import RankFailed, on_ranks
from tests.support.releases import since
from tests.support.selection import broad_after, slow_unless

TEXT = ("labels",)

KEEPS_REGIONS = since("torch", "2.13", "A region of autocast before the layers is computed in each stage")


@functools.cache
def trained(is_everyday: bool) -> list[dict[str, Any]] | str:
    """Return what each process found in all cases of one kind, or why they failed."""
    names = [name for name in PIPES if (name in EVERYDAY) == is_everyday]
    try:
        return on_ranks(train_all, 2, names)
    except RankFailed as error:
        return str(error)


def equal_to_one_process(pipe: Pipe, found: list[dict[str, Any]]) -> None:
    expected = in_one_process(pipe)
    losses = [each["losses"] for each in found if each["losses"]]
    close(torch.tensor(losses).mean(0), torch.tensor(expected["losses"]), 1e-6, "losses")
    for what in ("gradients", "after"):
        together = {name: tensor for each in found for name, tensor in each[what].items()}
        assert together.keys() == expected[what].keys()
        for each in found:
            assert len(each[what]) < len(together), "a process has the adapters of all stages"
            for name, tensor in each[what].items():
                close(tensor, expected[what][name], 1e-9, f"{what}: {name}")


@pytest.mark.broad
@KEEPS_REGIONS
@pytest.mark.parametrize("name", slow_unless(EVERYDAY.__contains__, PIPES))
def test_stages_in_two_processes_train_like_the_model_in_one(name: str) -> None:
    results = trained(name in EVERYDAY)
    assert not isinstance(results, str), results
    equal_to_one_process(PIPES[name], [found[name] for found in results])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_stages_in_four_processes_train_like_the_model_in_one(name: str) -> None:
    equal_to_one_process(FOUR[name], [found[name] for found in on_ranks(train_four, 4, [name])])


@pytest.mark.slow
def test_all_stages_write_the_file_of_one_process(tmp_path: Path) -> None:
    pipe = Pipe(llfx.DoRA(r=2), stages=3)
    refusals = on_ranks(save_stages, 3, pipe, tmp_path)
    llfx.save(make(pipe), tmp_path / "one.safetensors")
    assert (tmp_path / "adapter.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert all("llfx.save(stage, path) in all processes" in refusal for refusal in refusals)
    assert not (tmp_path / "peft").exists()


def run(parts: list[Any], inputs: dict[str, Any]) -> Any:
    """Call one stage after the other; return what the last one does."""
    results: Any = ()
    for part in parts:
        results = part(*(results if isinstance(results, tuple) else (results,)), **inputs)
    return results


@KEEPS_REGIONS
@pytest.mark.parametrize("stages", broad_after(1, [2, 3, 4, ["model.layers.1", "model.layers.2"]]))
def test_stages_one_after_the_other_compute_what_the_model_does(stages: Any) -> None:
    pipe = Pipe(llfx.LoRA(r=2))
    gm = make(pipe)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    parts = llfx.split(gm, stages, without="labels")
    inputs = batch(pipe, 0)
    for training in (True, False):
        gm.train(training)
        for part in parts:
            part.train(training)
        assert torch.equal(run(parts, inputs), gm(**inputs).logits)
    with torch.no_grad(), llfx.frozen(parts[0]):
        run(parts, inputs)
    assert gm.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("base", QUANTIZED)
def test_stages_of_a_quantized_model_compute_and_train_what_it_does(base: str) -> None:
    case = Case(llfx.LoRA(r=2), base=base)
    gm, inputs = make_case(case), training_batch(case, 0, 0)
    expected = gm(**inputs)
    gradients = torch.autograd.grad(expected.loss, llfx.adapter_parameters(gm))
    inputs.pop("labels")
    parts = llfx.split(gm, 2, without="labels")
    logits = run(parts, inputs)
    assert torch.equal(logits, expected.logits)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    for ours, theirs in zip(torch.autograd.grad(loss, llfx.adapter_parameters(gm)), gradients, strict=True):
        close(ours, theirs, 1e-5, "a gradient")


def test_a_stage_has_its_layers_and_nothing_of_the_others() -> None:
    gm = make(Pipe(llfx.LoRA(r=2)))
    first, last = llfx.split(gm, 2, without=TEXT)
    names = [{name for name, _ in part.named_parameters()} for part in (first, last)]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {name for name, _ in gm.named_parameters()}
    assert first.get_parameter("model.embed_tokens.weight") is gm.get_parameter("model.embed_tokens.weight")
    assert last.get_parameter("lm_head.weight") is gm.get_parameter("lm_head.weight")
    placeholders = [str(node.target) for node in last.graph.find_nodes(op="placeholder")]
    assert placeholders[1:] == ["input_ids", "attention_mask"], "more than the hidden state travels"


@pytest.mark.broad
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_layers_that_all_read_one_value_are_cut(stages: int) -> None:
    pipe = Pipe(llfx.LoRA(r=2), "t5")
    gm = make(pipe)
    inputs = batch(pipe, 0)
    results = run(llfx.split(gm, stages, without=without(pipe)), inputs)
    assert torch.equal(results[0] if isinstance(results, tuple) else results, gm(**inputs).logits)


class _Writes(nn.Module):
    """Layers around a value that is overwritten after the second one; and a mask that is made in place."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.late = late

    def forward(self, x: torch.Tensor) -> Any:
        mask = torch.ones_like(x).cumsum(-1)
        mask.mul_(0.5)
        kept = self.layers[0](x)
        view = kept[:, :2]
        x = self.layers[2](self.layers[1](kept).relu() * mask)
        if self.late:
            kept.add_(x)
        return self.layers[3](x * mask) + torch.cat([view, view], -1)


class _Autocast(nn.Module):
    """Layers of which two run in one region of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.layers[1](self.layers[0](x))
        return self.layers[2](x.float())


X = (torch.ones(3, 4),)


def test_a_value_that_was_written_in_place_is_sent() -> None:
    model = _Writes(late=False)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="layers"), X)
    x = torch.randn(5, 4)
    assert torch.equal(run(llfx.split(gm, 4), {"x": x}), gm(x))
    assert [len(part.graph.find_nodes(op="placeholder")) for part in llfx.split(gm, 4)][1:] == [4, 4, 3]


class _Turns(nn.Module):
    """Layers, of which the third gets the rows in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.layers[1](self.layers[0](x)).flip(0)
        return self.layers[3](self.layers[2](x))


def test_rows_that_an_earlier_stage_reorders_are_refused_in_a_later_one() -> None:
    gm = llfx.rewrite(_Turns(), {"fr": llfx.LoRA(r=2, target_names="layers")}, X)
    first, last = llfx.split(gm, 2)
    x = torch.randn(2, 4)
    with llfx.by_row(first, ["fr", None]):
        received = first(x=x)
    with (
        llfx.by_row(last, ["fr", None]),
        pytest.raises(llfx.AdapterError, match=r"'layers.2'.* after an earlier stage, where .*flip"),
    ):
        last(received, x=x)


def _of_layer(layer: int, **options: Any) -> Any:
    return llfx.rewrite(graph_of("llama"), llfx.LoRA(r=2, layers=layer, **options))


def _stage() -> Any:
    return llfx.split(make(Pipe(llfx.LoRA(r=2))), 2, without=TEXT)[0]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no adapters": (lambda: llfx.split(graph_of("llama"), 2), "has no adapters"),
    "wrapped": (
        lambda: llfx.split(llfx.wrap(graph_of("llama"), llfx.LoRA(r=2)), 2),
        "split takes a graph that rewrite",
    ),
    "adapted": (
        lambda: llfx.split(llfx.adapt(base_of("llama"), llfx.LoRA(r=2)), 2),
        r"split takes a graph that .*, not .*Llama.*The way out: split\(rewrite\(model, cfg\), stages\)",
    ),
    "too many stages": (lambda: llfx.split(_of_layer(0), 5), "cannot cut 4 layers into 5 stages; give 2 to 4"),
    "one stage": (lambda: llfx.split(_of_layer(0), 1), "into 1 stages"),
    "an unknown layer": (lambda: llfx.split(_of_layer(0), ["model.layers.9"]), r"no layer 'model.layers.9'; the .*0,"),
    "another order": (
        lambda: llfx.split(_of_layer(0), ["model.layers.2", "model.layers.1"]),
        "in the order of the graph",
    ),
    "the first layer": (lambda: llfx.split(_of_layer(0), "model.layers.0"), "of the second and later stages"),
    "a stage without adapters": (lambda: llfx.split(_of_layer(0), 2), "stage 1 would have no adapters to train"),
    "a tensor that both would train": (
        lambda: llfx.split(llfx.rewrite(graph_of("llama"), llfx.VBLoRA(r=2, num_vectors=8, vector_length=16)), 2),
        "read by the stages .0, 1., each of which would train",
    ),
    "a late write": (
        lambda: llfx.split(llfx.rewrite(_Writes(True), llfx.LoRA(r=2, target_names="layers"), X), 2),
        "a tensor that is written in place",
    ),
    "a region": (
        lambda: llfx.split(llfx.rewrite(_Autocast(), llfx.LoRA(r=2, target_names="layers"), X), 3),
        "a region with a mode of its own",
    ),
    "an unknown argument": (lambda: llfx.split(_of_layer(0), 2, without="mask"), "mask"),
    "add": (lambda: llfx.add(_stage(), {"b": llfx.LoRA(r=2)}), "a stage of a pipeline. The way out: do this before"),
    "merge": (lambda: llfx.merge(_stage()), "a stage of a pipeline. The way out: do this before split"),
    "split": (lambda: llfx.split(_stage(), 2), "a stage of a pipeline"),
}


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(4, REFUSED))
def test_refusal(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(llfx.AdapterError, match=message):
        call()


@pytest.mark.broad
@KEEPS_REGIONS
def test_a_stage_alone_is_not_saved_as_the_whole(tmp_path: Path) -> None:
    with pytest.raises(llfx.CheckpointError, match="the adapters of all 2 stages, and no process gave stage 1"):
        llfx.save(_stage(), tmp_path / "file")
    assert not [*tmp_path.iterdir()]


@pytest.mark.broad
def test_a_stage_without_an_input_says_which() -> None:
    with pytest.raises(TypeError, match="attention_mask"):
        _stage()(input_ids=torch.ones(2, 5, dtype=torch.long))
