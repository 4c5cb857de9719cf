"""Every variant runs on a CUDA device in every way of calling it: nothing stays on the CPU, and no value is read.

The device is not there: see `fake_cuda.py`. Backward does not run on fake tensors of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lora_lite_fx as llfx
from lora_lite_fx.errors import AdapterError
from tests.devices.fake_cuda import FROM_DATA, captured, config, elsewhere, kinds_of, on, rewritten
from tests.support.selection import broad_unless, is_typical

if torch.version.cuda is None:
    pytest.skip("this build of torch knows no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: its tensors have values")

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = [name for name in llfx.registry() if name not in FROM_DATA]

Run = Callable[[str, torch.dtype], tuple[Any, Any]]
"""Runs a model with an adapter of this name and type; returns the model and its results."""


def training(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype, **options)
    return gm, gm.train()(**inputs)


def checkpointed(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    return training(name, dtype, checkpoint_layers=True)


def fused_loss(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    return training(name, dtype, fuse_loss=True)


def planned(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    llfx.plan_memory(gm, "balanced")
    return gm, gm.train()(**inputs)


def inference(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    with torch.no_grad(), llfx.frozen(gm.eval()):
        return gm, gm(**inputs)


def under_autocast(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    gm, inputs = rewritten(name, dtype)
    with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16):
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


RUNS: list[Run] = [
    training,
    checkpointed,
    fused_loss,
    planned,
    inference,
    under_autocast,
    switched,
    bank,
]


def outcome(run: Run, name: str, dtype: torch.dtype, device: str) -> Any:
    """Return the devices, dtypes and shapes of the results of a run, or the error that refuses it."""
    with on(device):
        try:
            module, results = run(name, dtype)
        except AdapterError as error:
            return f"{type(error).__name__}: {error}"
        assert elsewhere(module, device) == []
        return kinds_of(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", broad_unless(is_typical, VARIANTS))
def test_all_is_on_the_device_and_in_the_types_of_the_cpu(name: str, run: Run, dtype: torch.dtype) -> None:
    expected, actual = outcome(run, name, dtype, "cpu"), outcome(run, name, dtype, "cuda")
    if isinstance(expected, str):  # refused, as a bank of some variants is
        assert actual == expected
        return
    assert not isinstance(actual, str), actual
    assert {device for device, _, _ in actual} == {"cuda"}
    assert [kind[1:] for kind in actual] == [kind[1:] for kind in expected]


def test_a_value_that_is_read_is_noticed() -> None:
    with on("cuda"), pytest.raises(Exception, match="_local_scalar_dense"):
        bool(torch.ones(3).sum() > 2)


def test_a_tensor_on_the_cpu_is_noticed() -> None:
    with on("cuda"), pytest.raises(Exception, match="device"):
        torch.ones(3) + torch.ones(3, device="cpu")
