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
from torch.package.package_exporter import PackageExporter

import lora_lite_fx as llfx
from tests.support.conformance import close, output, randomise, small
from tests.support.models import ids, one_layer_llama
from tests.support.selection import slow_after


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


def test_a_graph_is_not_packaged_without_its_adapters(graph: nn.Module) -> None:
    with PackageExporter(io.BytesIO()) as exporter:
        exporter.intern("**")
        with pytest.raises(llfx.AdapterError, match="cannot be pickled"):
            exporter.save_pickle("model", "model.pkl", graph)


def adapted_model() -> Any:
    model = llfx.adapt(one_layer_llama(), llfx.LoRA(r=2))
    randomise(model, 1)
    return model


def model_for_the_compiler() -> nn.Module:
    return llfx.backend(llfx.LoRA(r=2, target_names=("0",))).adapt(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4))


MESSAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "adapt": (
        adapted_model,
        "An adapted LlamaForCausalLM cannot be pickled, and so neither by torch.save: its graphs would come back"
        " without their records of adapters. llfx.save(model, path) writes the adapters, llfx.merge(model) returns a"
        " model of the plain class, and copy.deepcopy copies it.",
    ),
    "backend": (
        model_for_the_compiler,
        "A model that carries its adapters for torch.compile cannot be pickled, and so neither by torch.save."
        " llfx.save(model, path) writes the adapters, which llfx.load reads, and copy.deepcopy copies the model.",
    ),
}


@pytest.mark.broad
@pytest.mark.parametrize("kind", slow_after(1, MESSAGES))
def test_an_adapted_model_says_why_it_cannot_be_pickled(kind: str) -> None:
    make, message = MESSAGES[kind]
    model = make()
    for write in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(llfx.AdapterError) as caught:
            write(model)
        assert str(caught.value) == message
    twin = copy.deepcopy(model)
    assert llfx.adapter_state_dict(twin).keys() == llfx.adapter_state_dict(model).keys()


@pytest.mark.broad
def test_a_copy_of_an_adapted_model_runs_and_a_merged_one_can_be_pickled() -> None:
    model, x = adapted_model(), ids(2, 5)
    expected = model(input_ids=x).logits.detach()
    twin = copy.copy(model)
    assert llfx.adapter_parameters(twin)[0] is llfx.adapter_parameters(model)[0]
    close(twin(input_ids=x).logits.detach(), expected, 1e-6, "copied")
    read = pickle.loads(pickle.dumps(llfx.merge(model)))
    close(read(input_ids=x).logits.detach(), expected, 1e-5, "merged, written and read")


def test_wrapped_models_and_configs_are_pickled() -> None:
    model = llfx.wrap(nn.Sequential(nn.Linear(4, 4)), llfx.LoRA(r=2, target_names="0"), (torch.ones(2, 4),))
    randomise(model, 1)
    x = (torch.ones(3, 4),)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for read in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        close(output(read, x).detach(), output(model, x).detach(), 0, "read")
        assert llfx.adapter_state_dict(read).keys() == llfx.adapter_state_dict(model).keys()
    for cls in llfx.registry().values():
        cfg = small(cls, target_names=("q",))
        assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg
