"""Every variant runs on a CUDA device in every way of calling it: nothing stays on the CPU, and no value is read.

The device is not there: see `fake_cuda.py`. The backward pass is run by `backward_pass.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import lora_lite_fx as llfx
from lora_lite_fx.errors import CallError, ConfigError
from tests.devices.backward_pass import gradients_of
from tests.devices.fake_cuda import (
    FROM_DATA,
    autocast,
    captured,
    config,
    elsewhere,
    kinds_of,
    model,
    moved,
    on,
    rewritten,
    tokens,
)
from tests.support.selection import broad_after, broad_unless, is_typical

if torch.version.cuda is None:
    pytest.skip("this build of torch knows no CUDA device", allow_module_level=True)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: its tensors have values"),
    pytest.mark.filterwarnings("ignore:CUDA is not available"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = list(llfx.registry())

Run = Callable[[str, torch.dtype], tuple[Any, Any]]
"""Runs a model with an adapter of this name and type; returns the model and its results."""


def step(gm: Any, inputs: dict[str, Tensor]) -> Any:
    """Return the results of a step of training, with the gradients."""
    results = gm.train()(**inputs)
    trained = {id(parameter): name for name, parameter in gm.named_parameters() if parameter.requires_grad}
    gradients = {trained[id(leaf)]: gradient for leaf, gradient in gradients_of(results["loss"])}
    assert gradients
    return results, [gradients[name] for name in sorted(gradients)]


def training(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype, **options)
    return gm, step(gm, inputs)


def checkpointed(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    return training(name, dtype, checkpoint_layers=True)


def fused_loss(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    return training(name, dtype, fuse_loss=True)


def planned(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    llfx.plan_memory(gm, "balanced")
    return gm, step(gm, inputs)


def inference(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    with torch.no_grad(), llfx.frozen(gm.eval()):
        return gm, gm(**inputs)


def under_autocast(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype, labels=False)  # the logits have the type of the products then
    with autocast(inputs["input_ids"].device.type, torch.bfloat16):
        return gm, gm.train()(**inputs)


def switched(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    results = []
    with torch.no_grad():
        with llfx.active(gm, []):
            results.append(gm(**inputs))
        with llfx.scaled(gm, 0.5):
            results.append(gm(**inputs))
        with llfx.scaled(gm, torch.tensor([0.5, 1.0])):
            results.append(gm(**inputs))
    return gm, results


def bank(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    graph, inputs = captured(dtype)
    gm = llfx.rewrite(graph, llfx.Bank(config(name), slots=3))
    ids = torch.zeros(2, dtype=torch.long)
    with torch.no_grad(), llfx.frozen(gm.eval()):
        return gm, [gm(**inputs, adapter_ids=ids), gm.train()(**inputs, adapter_ids=ids)]


def merged(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    gm = llfx.merge(gm)
    return gm, gm(**inputs)


def moved_later(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = moved(name, dtype)
    results = [step(gm, inputs)]
    del inputs["attention_mask"]  # then the graph makes one
    with torch.no_grad(), llfx.frozen(gm.eval()):
        return gm, [*results, gm(**inputs)]


RUNS: list[Run] = [
    training,
    checkpointed,
    fused_loss,
    planned,
    inference,
    under_autocast,
    switched,
    bank,
    merged,
    moved_later,
]


def outcome(run: Run, name: str, dtype: torch.dtype, device: str) -> Any:
    """Return the devices, dtypes and shapes of the results of a run, or the error that refuses a bank."""
    with on(device):
        try:
            module, results = run(name, dtype)
        except ConfigError as error:
            if run is not bank:
                raise
            return str(error)
        assert elsewhere(module, device) == []
        return kinds_of(results)


@pytest.mark.parametrize("dtype", broad_after(1, DTYPES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", broad_unless(is_typical, VARIANTS))
def test_all_is_on_the_device_and_in_the_types_of_the_cpu(name: str, run: Run, dtype: torch.dtype) -> None:
    expected, actual = outcome(run, name, dtype, "cpu"), outcome(run, name, dtype, "cuda")
    if isinstance(expected, str):
        assert actual == expected
        return
    assert not isinstance(actual, str), actual
    assert {device for device, _, _ in actual} == {"cuda"}
    assert [kind[1:] for kind in actual] == [kind[1:] for kind in expected]


@pytest.fixture
def caches_without_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caches begin without `torch.tensor([])`, a constant, which a trace would make on the device itself."""

    def begin(self: Any, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys.new_empty(0), values.new_empty(0)
        self.is_initialized = True

    monkeypatch.setattr(DynamicLayer, "lazy_initialization", begin)


def calls_of_generate(name: str, dtype: torch.dtype) -> list[Any]:
    """Return the results of the calls of an adapted model: training, prefill, one more token, and a static cache."""
    chat: Any = llfx.adapt(model(dtype), config(name), verify=False)
    inputs = tokens()
    results = [step(chat, inputs)]
    del inputs["labels"]
    chat.eval()
    with torch.no_grad():
        cache: Any = DynamicCache(config=chat.config)
        results.append(chat(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
        following = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(2, 10, dtype=torch.long)}
        results.append(chat(**following, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
        results += [(layer.keys, layer.values) for layer in cache.layers]
        fixed = StaticCache(config=chat.config, max_cache_len=16)
        results.append(chat(**inputs, past_key_values=fixed, use_cache=True).logits)
    return results


@pytest.mark.usefixtures("caches_without_constants")
@pytest.mark.parametrize("dtype", broad_after(1, DTYPES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", broad_unless(lambda name: name == "LoRA", [n for n in VARIANTS if n not in FROM_DATA]))
def test_an_adapted_model_takes_the_calls_of_generate(name: str, dtype: torch.dtype) -> None:
    kinds = {}
    for device in ("cpu", "cuda"):
        with on(device):
            kinds[device] = kinds_of(calls_of_generate(name, dtype))
    assert {device for device, _, _ in kinds["cuda"]} == {"cuda"}
    assert [kind[1:] for kind in kinds["cuda"]] == [kind[1:] for kind in kinds["cpu"]]


def test_a_graph_on_another_device_than_its_input_names_it() -> None:
    with on("cuda"):
        gm, inputs = rewritten("LoRA", torch.float32)
        inputs["input_ids"] = torch.zeros(2, 9, dtype=torch.long, device="cpu")
        with pytest.raises(
            CallError,
            match=r"^input_ids is on cpu in this call, and the graph is on cuda:0\. The way out: "
            r'model\.to\("cpu"\), or input_ids\.to\("cuda:0"\)\.$',
        ):
            gm(**inputs)


def test_a_tensor_of_a_graph_on_another_device_is_named() -> None:
    with on("cuda"):
        gm, inputs = rewritten("LoRA", torch.float32)
        norm: Any = gm.get_submodule("model.norm")
        norm.weight = torch.nn.Parameter(torch.ones(32, device="cpu"), requires_grad=False)
        with pytest.raises(
            CallError, match=r"^model\.norm\.weight is on cpu in this call, and the graph is on cuda:0\."
        ):
            gm(**inputs)


def test_a_value_that_is_read_is_noticed() -> None:
    with on("cuda"), pytest.raises(Exception, match="_local_scalar_dense"):
        bool(torch.ones(3).sum() > 2)


def test_a_tensor_on_the_cpu_is_noticed() -> None:
    with on("cuda"), pytest.raises(Exception, match="device"):
        torch.ones(3) + torch.ones(3, device="cpu")
